#include "model/tensors.h"

#include <gtest/gtest.h>

#include <cstring>

#include "support/errors.h"

// Read by the address sanitizer: an allocation that is too large fails, as it does without it,
// instead of ending the program.
extern "C" const char* __asan_default_options() {
  return "allocator_may_return_null=1";
}

namespace mamba3 {
namespace {

using testing::error_of;
using testing::input_error_of;
using Dims = std::vector<int64_t>;

// Every kind of parameter: MIMO with norm, an attention layer with biases, MLP, untied.
Config everything() {
  Config c;
  c.D = 6;
  c.n_layer = 2;
  c.d_mlp = 128;
  c.vocab = 10;
  c.vocab_padded = 16;
  c.tied = false;
  c.mixer = {.H = 3, .P = 4, .N = 8, .G = 1, .R = 2, .S = 2, .mimo = true, .out_norm = true};
  c.layers = {LayerKind::mamba3, LayerKind::attention};
  c.attention = {.Hq = 4, .Hkv = 2, .d = 5, .qkv_bias = true, .out_bias = true};
  return c;
}

TEST(ParameterTable, NamesDimsDecayAndInit) {
  struct Row {
    std::string name;
    Dims dims;
    bool decay;
    Init init;
  };
  const std::string l0 = "backbone.layers.0.", l1 = "backbone.layers.1.";
  const std::vector<Row> want = {
      {"backbone.embedding.weight", {16, 6}, true, Init::normal},
      {l0 + "norm.weight", {6}, false, Init::ones},
      {l0 + "mixer.in_proj.weight", {2 * 12 + 2 * 16 + 3 * 3 + 2, 6}, true, Init::fan_in},
      {l0 + "mixer.dt_bias", {3}, false, Init::dt_bias},
      {l0 + "mixer.B_bias", {3, 2, 8}, false, Init::ones},
      {l0 + "mixer.C_bias", {3, 2, 8}, false, Init::ones},
      {l0 + "mixer.B_norm.weight", {8}, false, Init::ones},
      {l0 + "mixer.C_norm.weight", {8}, false, Init::ones},
      {l0 + "mixer.mimo_x", {3, 2, 4}, true, Init::inverse_rank},
      {l0 + "mixer.mimo_z", {3, 2, 4}, true, Init::ones},
      {l0 + "mixer.mimo_o", {3, 2, 4}, true, Init::inverse_rank},
      {l0 + "mixer.D", {3}, false, Init::ones},
      {l0 + "mixer.norm.weight", {12}, false, Init::ones},
      {l0 + "mixer.out_proj.weight", {6, 12}, true, Init::residual_out},
      {l0 + "norm2.weight", {6}, false, Init::ones},
      {l0 + "mlp.fc1.weight", {256, 6}, true, Init::fan_in},
      {l0 + "mlp.fc2.weight", {6, 128}, true, Init::residual_out},
      {l1 + "norm.weight", {6}, false, Init::ones},
      {l1 + "mixer.in_proj.weight", {40, 6}, true, Init::fan_in},
      {l1 + "mixer.in_proj.bias", {40}, false, Init::zeros},
      {l1 + "mixer.out_proj.weight", {6, 20}, true, Init::residual_out},
      {l1 + "mixer.out_proj.bias", {6}, false, Init::zeros},
      {l1 + "norm2.weight", {6}, false, Init::ones},
      {l1 + "mlp.fc1.weight", {256, 6}, true, Init::fan_in},
      {l1 + "mlp.fc2.weight", {6, 128}, true, Init::residual_out},
      {"backbone.norm_f.weight", {6}, false, Init::ones},
      {"lm_head.weight", {16, 6}, true, Init::fan_in},
  };
  const std::vector<TensorSpec> table = parameter_table(everything());
  ASSERT_EQ(table.size(), want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_EQ(table[i].name, want[i].name);
    EXPECT_EQ(table[i].dims, want[i].dims) << want[i].name;
    EXPECT_EQ(table[i].decay, want[i].decay) << want[i].name;
    EXPECT_EQ(table[i].init, want[i].init) << want[i].name;
    EXPECT_EQ(table[i].dtype, DType::f32) << want[i].name;
    EXPECT_EQ(table[i].lifetime, Lifetime::parameter) << want[i].name;
  }
}

TEST(ParameterTable, LeavesOutWhatTheModelLacks) {
  Config c = everything();
  c.tied = true;
  c.d_mlp = 0;
  c.mixer.mimo = c.mixer.out_norm = false;
  c.mixer.R = 1;
  c.attention.qkv_bias = c.attention.out_bias = false;
  std::vector<std::string> names;
  for (const TensorSpec& spec : parameter_table(c)) names.push_back(spec.name);
  const std::string l0 = "backbone.layers.0.", l1 = "backbone.layers.1.";
  EXPECT_EQ(names,
            (std::vector<std::string>{
                "backbone.embedding.weight", l0 + "norm.weight", l0 + "mixer.in_proj.weight",
                l0 + "mixer.dt_bias", l0 + "mixer.B_bias", l0 + "mixer.C_bias",
                l0 + "mixer.B_norm.weight", l0 + "mixer.C_norm.weight", l0 + "mixer.D",
                l0 + "mixer.out_proj.weight", l1 + "norm.weight", l1 + "mixer.in_proj.weight",
                l1 + "mixer.out_proj.weight", "backbone.norm_f.weight"}));
}

TEST(NamedTensors, KeepsOrderAndOwners) {
  NamedTensors tensors;
  auto memory = std::make_shared<std::vector<float>>(6);
  const std::weak_ptr<std::vector<float>> alive = memory;
  tensors.add("b", view_of(memory->data(), {2}), memory);
  tensors.add("a", view_of(memory->data() + 2, {4}), memory);
  memory.reset();
  EXPECT_FALSE(alive.expired());
  EXPECT_EQ(tensors.names(), (std::vector<std::string>{"b", "a"}));
  EXPECT_TRUE(tensors.contains("a"));
  EXPECT_FALSE(tensors.contains("c"));
  EXPECT_EQ(tensors.at("a").dim(0), 4);
  EXPECT_TRUE(tensors.find("c").empty());
  EXPECT_EQ(input_error_of([&] { (void)tensors.at("c"); }), "there is no tensor \"c\"");
  EXPECT_EQ(error_of([&] { tensors.add("a", View{}); }), "there is a tensor \"a\" already");
  tensors = NamedTensors();
  EXPECT_TRUE(alive.expired());
}

TEST(Allocate, GivesZeroedAlignedDisjointTensors) {
  const std::vector<TensorSpec> table = {
      {.name = "a", .dims = {3}},
      {.name = "b", .dims = {2, 5}, .dtype = DType::bf16},
      {.name = "empty", .dims = {0, 4}},
      {.name = "c", .dims = {}, .dtype = DType::f64},
  };
  const NamedTensors tensors = allocate(table);
  const char* end = nullptr;  // of the tensor before
  for (const TensorSpec& spec : table) {
    const View& view = tensors.at(spec.name);
    EXPECT_EQ(view.dtype, spec.dtype);
    EXPECT_EQ(view.rank, static_cast<int>(spec.dims.size()));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(view.data) % 64, 0u);
    const char* begin = static_cast<const char*>(view.data);
    EXPECT_GE(begin, end);
    end = begin + view.bytes();
    for (const char* p = begin; p < end; ++p) EXPECT_EQ(*p, 0);
    std::memset(view.data, 1, static_cast<size_t>(view.bytes()));
  }
  EXPECT_EQ(tensors.at("b").shape(), "(2, 5)");
}

TEST(Allocate, NothingIsFine) {
  EXPECT_TRUE(allocate({}).names().empty());
}

TEST(Allocate, ReportsWhatItCannotGet) {
  const std::vector<TensorSpec> table = {{.name = "huge", .dims = {int64_t{1} << 50}}};
  EXPECT_EQ(error_of([&] { allocate(table); }), "out of memory: 4503599627370496 bytes");
}

}  // namespace
}  // namespace mamba3
