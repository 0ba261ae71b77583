// Rows of a projection begin at multiples of 64 elements, with columns behind them that nobody
// reads or writes; on either device.

#include <cmath>
#include <cstring>

#include "model/language_model.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

constexpr int64_t kRows = 2, kTokens = 70, kAll = kRows * kTokens;

std::vector<TinyConfig> configs() {
  std::vector<TinyConfig> all = tiny_configs();
  TinyConfig tiles{"tiles", tiny_config("siso")};  // with what the GPU's scan on tensor cores takes
  tiles.config.mixer.H = 2, tiles.config.mixer.P = 64;
  tiles.config.mixer.N = 64, tiles.config.mixer.S = 16;
  all.push_back(tiles);
  return all;
}

void fill(Context& ctx, const NamedTensors& tensors, int byte) {
  for (const std::string& name : tensors.names()) {
    const View& view = tensors.at(name);
    std::vector<unsigned char> bytes(static_cast<size_t>(view.bytes()),
                                     static_cast<unsigned char>(byte));
    copy(ctx, make_view(bytes.data(), DType::u8, {view.bytes()}),
         make_view(view.data, DType::u8, {view.bytes()}, view.device));
  }
}

// The columns behind those of a layer.
View gap_of(const View& proj) {
  View gap = proj;
  gap.data = static_cast<char*>(gap.data) + proj.dim(1) * size_of(proj.dtype);
  gap.dims[1] = proj.stride(0) - proj.dim(1);
  return gap;
}

class ActivationRows : public ::testing::TestWithParam<TinyConfig> {
 protected:
  // Projections of a forward with Keep::nothing, or of a forward and a backward.
  static std::vector<View> projections(const ModelActivations& activations) {
    std::vector<View> all;
    for (const BlockActivations& block : activations.blocks) {
      all.push_back(block.proj);
      if (!block.d_proj.empty()) all.push_back(block.d_proj);
    }
    return all;
  }

  struct Result {
    Tensor logits;
    NamedTensors gradients;
  };
  // Of activations whose memory is first filled with such bytes; `dense`: without gaps.
  Result run(Keep keep, DType dtype, int byte, bool dense = false) {
    const Config& config = GetParam().config;
    Context ctx = make_context(2);
    const LanguageModel model = place_language_model(ctx, tiny_model(config, 7), dtype);
    const NamedTensors memory =
        allocate(activation_table(config, kAll, keep, dtype), test_device());
    fill(ctx, memory, byte);
    ModelActivations activations = resolve_activations(config, memory, kAll);
    std::vector<std::shared_ptr<void>> owners;
    const auto make_dense = [&](View& proj) {
      if (!dense || proj.empty()) return;
      owners.push_back(allocate_bytes(test_device(), static_cast<size_t>(proj.bytes())));
      proj = make_view(owners.back().get(), dtype, {kAll, proj.dim(1)}, test_device());
    };
    for (BlockActivations& block : activations.blocks) {
      make_dense(block.proj), make_dense(block.d_proj);
    }
    Random random(11);
    const Tensor ids = Tensor::integers(random, {kRows, kTokens}, 0, config.vocab);
    const Tensor targets = Tensor::integers(random, {kAll}, 0, config.vocab);
    Result result{Tensor({kAll, config.vocab_padded}),
                  allocate(parameter_table(config), test_device())};
    model_forward(ctx, model, {.ids = ids, .activations = activations});
    model_logits(ctx, model, activations.hidden, result.logits);
    if (keep == Keep::for_backward) {
      const ModelWeights gradients = resolve_weights(config, result.gradients);
      const Tensor nll({kAll});
      model_loss(
          ctx, model,
          {.activations = activations, .targets = targets, .nll = nll, .gradients = &gradients});
      model_backward(ctx, model, {.ids = ids, .activations = activations, .gradients = gradients});
    }
    // In a hybrid, layers of other widths share the memory.
    if (!dense && byte == 0xff && !config.has(LayerKind::attention)) {
      for (const View& proj : projections(activations)) {
        if (proj.stride(0) == proj.dim(1)) continue;
        for (const double value : values_of(gap_of(proj))) EXPECT_TRUE(std::isnan(value));
      }
    }
    result.gradients = copy_to_host(ctx, result.gradients);
    return result;
  }
};

INSTANTIATE_TEST_SUITE_P(Tiny, ActivationRows, ::testing::ValuesIn(configs()), tiny_test_name);

TEST_P(ActivationRows, BeginAtMultiplesOf64Elements) {
  const Config& config = GetParam().config;
  for (const Keep keep : {Keep::nothing, Keep::for_backward, Keep::streams}) {
    for (const DType dtype : test_dtypes()) {
      const auto table = activation_table(config, kAll, keep, dtype);
      int count = 0;
      for (const TensorSpec& spec : table) {
        if (!spec.name.ends_with("proj")) continue;
        ++count;
        EXPECT_EQ(spec.dims[1] % 64, 0) << spec.name;
        EXPECT_EQ(spec.dtype, dtype) << spec.name;
      }
      EXPECT_GT(count, 0);
      const NamedTensors memory = allocate(table);
      // Also of fewer tokens than there is room for.
      for (const int64_t tokens : {kAll, kAll / 2}) {
        const ModelActivations activations = resolve_activations(config, memory, tokens);
        for (int64_t layer = 0; layer < config.n_layer; ++layer) {
          const int64_t columns = widths_of(config, layer).proj;
          const BlockActivations& block = activations.blocks[static_cast<size_t>(layer)];
          for (const View& proj : {block.proj, block.d_proj}) {
            if (keep == Keep::nothing && proj.empty()) continue;  // there is no d_proj
            EXPECT_EQ(proj.dim(0), tokens);
            EXPECT_EQ(proj.dim(1), columns);
            EXPECT_EQ(proj.stride(0), (columns + 63) / 64 * 64);
            EXPECT_EQ(reinterpret_cast<uintptr_t>(proj.data) % 64, 0u);
          }
        }
      }
    }
  }
}

// NaN, in the gaps and wherever else a forward or a backward might read before it writes.
TEST_P(ActivationRows, WhatWasThereBeforeDoesNotMatter) {
  for (const DType dtype : test_dtypes()) {
    for (const Keep keep : {Keep::nothing, Keep::for_backward}) {
      SCOPED_TRACE(name_of(dtype));
      const Result zeros = run(keep, dtype, 0), nans = run(keep, dtype, 0xff);
      for (const double value : zeros.logits.values()) ASSERT_TRUE(std::isfinite(value));
      EXPECT_TRUE(same_bits(nans.logits, zeros.logits));
      for (const std::string& name : zeros.gradients.names()) {
        EXPECT_TRUE(same_bits(nans.gradients.at(name), zeros.gradients.at(name))) << name;
      }
    }
  }
}

TEST_P(ActivationRows, GapsChangeNothing) {
  const Result padded = run(Keep::for_backward, DType::f32, 0);
  const Result dense = run(Keep::for_backward, DType::f32, 0, true);
  EXPECT_TRUE(near(padded.logits, dense.logits.values(), {.unit = 1e-5, .terms = 64}));
  for (const std::string& name : dense.gradients.names()) {
    EXPECT_TRUE(near(padded.gradients.at(name), values_of(dense.gradients.at(name)),
                     {.unit = 1e-5, .terms = kAll}))
        << name;
  }
  for (const DType dtype : test_dtypes()) {
    if (dtype == DType::f32) continue;
    // Rows with gaps may have other kernels there.
    const Tensor want = run(Keep::nothing, dtype, 0, true).logits;
    EXPECT_LT(relative_norm(run(Keep::nothing, dtype, 0).logits, want.values()), 2e-2);
  }
}

}  // namespace
}  // namespace mamba3::testing
