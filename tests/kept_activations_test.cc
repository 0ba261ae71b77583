// What a forward keeps for the backward and what the backward does again; on either device.

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "core/error.h"
#include "core/memory.h"
#include "model/language_model.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

constexpr int64_t kRows = 2, kTokens = 20, kAll = kRows * kTokens;

// A forward and a backward, with a look at the activations, or a change to them, before each.
struct Pass {
  using Change = std::function<void(Context&, ModelActivations&)>;

  Config config;
  Keep keep = Keep::for_backward;
  DType dtype = DType::f32;
  std::vector<View> residuals = {};
  Change before_forward = {}, before_backward = {};

  NamedTensors gradients() const {
    Context ctx = make_context(2);
    const LanguageModel model = place_language_model(ctx, tiny_model(config, 7), dtype);
    const NamedTensors memory =
        allocate(activation_table(config, kAll, keep, dtype), test_device());
    ModelActivations activations = resolve_activations(config, memory, kAll);
    Random random(11);
    const Tensor ids = Tensor::integers(random, {kRows, kTokens}, 0, config.vocab);
    const Tensor targets = Tensor::integers(random, {kAll}, 0, config.vocab);
    const NamedTensors tensors = allocate(parameter_table(config), test_device());
    const ModelWeights gradients = resolve_weights(config, tensors);
    if (before_forward) before_forward(ctx, activations);
    model_forward(ctx, model, {.ids = ids, .activations = activations, .residuals = residuals});
    const Tensor nll({kAll});
    model_loss(
        ctx, model,
        {.activations = activations, .targets = targets, .nll = nll, .gradients = &gradients});
    if (before_backward) before_backward(ctx, activations);
    model_backward(ctx, model, {.ids = ids, .activations = activations, .gradients = gradients});
    return copy_to_host(ctx, tensors);
  }
};

void expect_same(const NamedTensors& got, const NamedTensors& want) {
  for (const std::string& name : want.names()) {
    for (const double value : values_of(want.at(name))) ASSERT_TRUE(std::isfinite(value)) << name;
    EXPECT_TRUE(same_bits(got.at(name), want.at(name))) << name;
  }
}

// The lifetimes in the table, by name.
std::map<std::string, Lifetime> planned(const Config& config, Keep keep, DType dtype) {
  std::map<std::string, Lifetime> all;
  for (const TensorSpec& spec : activation_table(config, kAll, keep, dtype)) {
    const auto [_, is_new] = all.emplace(spec.name, spec.lifetime);
    EXPECT_TRUE(is_new) << spec.name;
  }
  return all;
}

class KeptActivations : public ::testing::TestWithParam<TinyConfig> {};

INSTANTIATE_TEST_SUITE_P(Tiny, KeptActivations, ::testing::ValuesIn(tiny_configs()),
                         tiny_test_name);

TEST_P(KeptActivations, AreOfEachLayerUnlessRecomputed) {
  const Config& config = GetParam().config;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const auto kept = planned(config, Keep::for_backward, dtype);
    const auto streams = planned(config, Keep::streams, dtype);
    const auto nothing = planned(config, Keep::nothing, dtype);
    std::vector<std::string> names = {"rstd", "normed", "proj", "y"};
    if (config.d_mlp > 0) {
      for (const char* name : {"residual2", "rstd2", "normed2", "fc1", "act"})
        names.emplace_back(name);
    }
    for (int64_t layer = 0; layer < config.n_layer; ++layer) {
      const std::string prefix = fmt::format("layers.{}.", layer);
      for (const std::string& name : names) {
        ASSERT_TRUE(kept.contains(prefix + name)) << prefix + name;
        EXPECT_EQ(kept.at(prefix + name), Lifetime::activation) << prefix + name;
        EXPECT_FALSE(streams.contains(prefix + name)) << prefix + name;
      }
      EXPECT_TRUE(streams.contains(prefix + "residual"));
    }
    for (const std::string& name : names) {
      ASSERT_TRUE(streams.contains("block." + name)) << name;
      EXPECT_EQ(streams.at("block." + name), Lifetime::scratch) << name;
      EXPECT_FALSE(kept.contains("block." + name)) << name;
    }
    // Inference has the buffers once.
    EXPECT_TRUE(nothing.contains("normed"));
    EXPECT_FALSE(nothing.contains("normed2"));
    // Products of the gradient take it in the type of the activations.
    EXPECT_EQ(kept.contains("d_stream_copy"), dtype != DType::f32);
    EXPECT_EQ(streams.contains("d_stream_copy"), dtype != DType::f32);
    EXPECT_FALSE(nothing.contains("d_stream_copy"));
  }
}

TEST_P(KeptActivations, RecomputingThemGivesTheSameBits) {
  for (const DType dtype : test_dtypes()) {
    SCOPED_TRACE(name_of(dtype));
    const Pass kept{.config = GetParam().config, .dtype = dtype};
    Pass recomputed = kept;
    recomputed.keep = Keep::streams;
    expect_same(recomputed.gradients(), kept.gradients());
  }
}

// What was kept is what the gradients of the weights are formed from.
TEST_P(KeptActivations, AreNotComputedAgain) {
  const Config& config = GetParam().config;
  for (const DType dtype : test_dtypes()) {
    const Pass run{.config = config,
                   .dtype = dtype,
                   .before_backward = [](Context& ctx, ModelActivations& activations) {
                     const BlockActivations& last = activations.blocks.back();
                     zero(ctx, last.normed);
                     if (!last.act.empty()) zero(ctx, last.normed2), zero(ctx, last.act);
                   }};
    const NamedTensors gradients = run.gradients();
    const auto largest = [&](int64_t layer, std::string_view what) {
      double most = 0;
      const std::string name = fmt::format("backbone.layers.{}.{}", layer, what);
      for (const double value : values_of(gradients.at(name)))
        most = std::max(most, std::abs(value));
      return most;
    };
    for (const char* name : {"mixer.in_proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}) {
      if (config.d_mlp == 0 && std::string_view(name).starts_with("mlp")) continue;
      EXPECT_EQ(largest(config.n_layer - 1, name), 0) << name;
      EXPECT_GT(largest(0, name), 0) << name;
    }
  }
}

// Without a copy of the stream's gradient each product converts it itself, to the same bits. Where
// the products take f32, a copy changes nothing.
TEST_P(KeptActivations, ACopyOfTheGradientChangesNoBit) {
  for (const DType dtype : test_dtypes()) {
    SCOPED_TRACE(name_of(dtype));
    const Tensor copy({kAll, GetParam().config.D}, dtype);  // NaN
    Pass with{.config = GetParam().config, .dtype = dtype}, without = with;
    with.before_forward = [&](Context&, ModelActivations& a) { a.d_stream_copy = copy; };
    without.before_forward = [](Context&, ModelActivations& a) { a.d_stream_copy = {}; };
    expect_same(with.gradients(), without.gradients());
  }
}

// Copies of the stream, for tools, leave what is kept alone.
TEST_P(KeptActivations, CopiesOfTheStreamLeaveThemAlone) {
  const Config& config = GetParam().config;
  for (const DType dtype : test_dtypes()) {
    for (const Keep keep : {Keep::for_backward, Keep::streams}) {
      const Pass run{.config = config, .keep = keep, .dtype = dtype};
      std::vector<Tensor> residuals;
      Pass copying = run;
      for (int64_t layer = 0; layer < config.n_layer; ++layer) {
        residuals.emplace_back(Tensor({kAll, config.D}));
        copying.residuals.push_back(residuals.back());
      }
      expect_same(copying.gradients(), run.gradients());
    }
  }
}

}  // namespace
}  // namespace mamba3::testing
