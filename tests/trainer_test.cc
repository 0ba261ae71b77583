#include "train/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "core/error.h"
#include "model/init.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/random.h"
#include "support/tensor.h"
#include "support/tiny_model.h"
#include "train/settings.h"

namespace mamba3 {
namespace {

using testing::same_bits;
using testing::values_of;

Config tiny_config(bool mimo = false) {
  TrainSettings settings;
  settings.d_model = 16;
  settings.layers = 2;
  settings.d_state = 8;
  settings.headdim = 8;
  settings.mlp = 128;
  settings.mimo = mimo;
  settings.rank = 2;
  settings.untied = true;
  return model_config(settings, 20);
}

Batch random_batch(testing::Random& random, int64_t B, int64_t T) {
  Batch batch;
  batch.resize(B, T);
  for (int32_t& token : batch.tokens) token = static_cast<int32_t>(random.below(20));
  for (int32_t& target : batch.targets) target = static_cast<int32_t>(random.below(20));
  return batch;
}

Batch rows(Batch& batch, int64_t from, int64_t to) {
  Batch part;
  part.resize(to - from, batch.T);
  for (int64_t b = from; b < to; ++b) {
    std::ranges::copy(batch.row_tokens(b), part.row_tokens(b - from).begin());
    std::ranges::copy(batch.row_targets(b), part.row_targets(b - from).begin());
  }
  return part;
}

// A model to train, always from the same weights.
struct Fixture {
  explicit Fixture(const Config& model = tiny_config(), int threads = 2)
      : config(model),
        ctx(threads),
        trainer(ctx, config, Trainer::fresh_state(config, init_parameters(ctx, config, 1)), 256) {}

  View weight(const std::string& name) const { return trainer.state().parameters.at(name); }

  Config config;
  Context ctx;
  Trainer trainer;
};

// With this eps an update of AdamW is proportional to the gradient, so that rounding in a gradient
// near zero cannot turn an update around.
OptimizerSettings proportional() {
  return {.beta1 = 0, .beta2 = 0, .eps = 1, .weight_decay = 0, .clip = 0};
}

TEST(Trainer, OverfitsOneBatch) {
  for (const bool mimo : {false, true}) {
    Fixture f(tiny_config(mimo));
    testing::Random random(1);
    const Batch batch = random_batch(random, 2, 16);
    const double first = f.trainer.update({&batch, 1}, {}, 1e-2).loss;
    EXPECT_NEAR(first, std::log(20), 0.5);
    double last = first;
    for (int i = 0; i < 80; ++i) last = f.trainer.update({&batch, 1}, {}, 1e-2).loss;
    EXPECT_LT(last, 0.05 * first);
  }
}

TEST(Trainer, TwoMicroBatchesAreOneOfBothSizes) {
  testing::Random random(2);
  Batch whole = random_batch(random, 6, 16);
  // Unequal numbers of scored tokens: the mean is over tokens, not over micro batches.
  std::ranges::fill(whole.row_targets(0), -1);
  const std::vector<Batch> parts = {rows(whole, 0, 2), rows(whole, 2, 6)};
  Fixture one, two;
  const Update a = one.trainer.update({&whole, 1}, proportional(), 0.1);
  const Update b = two.trainer.update(parts, proportional(), 0.1);
  EXPECT_NEAR(a.loss, b.loss, 1e-6 * a.loss);
  EXPECT_NEAR(a.grad_norm, b.grad_norm, 1e-5 * a.grad_norm);
  const Trainer::State state = one.trainer.state();
  for (const std::string& name : state.parameters.names()) {
    EXPECT_TRUE(testing::near(two.weight(name), values_of(one.weight(name)), {.unit = 1e-5}))
        << name;
  }
}

TEST(Trainer, ClippingScalesTheUpdateToTheNorm) {
  testing::Random random(3);
  const Batch batch = random_batch(random, 2, 16);
  const auto moved = [&](double clip) {
    Fixture f;
    const std::string name = "backbone.layers.0.mixer.in_proj.weight";
    const std::vector<double> before = values_of(f.weight(name));
    OptimizerSettings optimizer = proportional();
    optimizer.clip = clip;
    optimizer.eps = 1e3;  // far above any gradient: the update is linear in it
    const Update update = f.trainer.update({&batch, 1}, optimizer, 1e4);
    const std::vector<double> after = values_of(f.weight(name));
    double squares = 0;
    for (size_t i = 0; i < before.size(); ++i) squares += std::pow(after[i] - before[i], 2);
    return std::pair(update.grad_norm, std::sqrt(squares));
  };
  const auto [norm, free] = moved(0);
  const auto [norm_clipped, clipped] = moved(norm / 4);
  EXPECT_EQ(norm, norm_clipped);  // reported before clipping
  EXPECT_NEAR(clipped, free / 4, 1e-3 * free);
  EXPECT_EQ(moved(2 * norm).second, free);
}

// Recomputing gives the same bits, and plans for less memory. On the GPU also in bf16.
TEST(Trainer, RecomputingChangesNothingButTheMemory) {
  for (const char* name : {"siso", "mimo", "hybrid", "wide"}) {
    const bool wide = std::string_view(name) == "wide";  // more than a few vectors a row
    Config config = testing::tiny_config(wide ? "siso" : name);
    if (wide) config.D = 200;
    Context ctx = testing::make_context(2);
    testing::Random random(8);
    Batch batch = random_batch(random, 2, 16);
    const Trainer::State fresh = Trainer::fresh_state(config, init_parameters(ctx, config, 3));
    struct Result {
      std::vector<double> losses, norms;  // of the gradient
      Trainer::State state;
    };
    const auto train = [&](bool recompute, DType dtype) {
      Trainer::State start = fresh;  // updated in place on the CPU
      start.parameters = copy_to_host(ctx, fresh.parameters);
      start.m = copy_to_host(ctx, fresh.m);
      start.v = copy_to_host(ctx, fresh.v);
      Trainer trainer(ctx, config, start, 32, dtype, recompute);
      Result result;
      for (int step = 0; step < 3; ++step) {
        const Update update = trainer.update({&batch, 1}, {}, 1e-2);
        result.losses.push_back(update.loss);
        result.norms.push_back(update.grad_norm);
      }
      result.state = trainer.state();
      return result;
    };
    for (const DType dtype : testing::test_dtypes()) {
      SCOPED_TRACE(std::string(name) + " in " + std::string(name_of(dtype)));
      const Result kept = train(false, dtype), recomputed = train(true, dtype);
      EXPECT_EQ(recomputed.losses, kept.losses);
      EXPECT_EQ(recomputed.norms, kept.norms);
      for (const std::string& tensor : kept.state.parameters.names()) {
        EXPECT_TRUE(
            same_bits(recomputed.state.parameters.at(tensor), kept.state.parameters.at(tensor)))
            << tensor;
        // The first moment is a sum of the gradients.
        EXPECT_TRUE(same_bits(recomputed.state.m.at(tensor), kept.state.m.at(tensor))) << tensor;
      }
    }
    const auto bytes = [&](Keep keep) {
      int64_t sum = 0;
      for (const TensorSpec& spec : activation_table(config, 32, keep)) {
        sum += spec.dims[0] * spec.dims[1] * size_of(spec.dtype);
      }
      return sum;
    };
    EXPECT_LT(bytes(Keep::streams), bytes(Keep::for_backward)) << name;
  }
}

TEST(Trainer, WeightDecaySparesNormsAndBiases) {
  testing::Random random(4);
  const Batch batch = random_batch(random, 2, 16);
  Config config = tiny_config(/*mimo=*/true);
  config.mixer.out_norm = true;
  Fixture without(config), with(config);
  OptimizerSettings optimizer;
  optimizer.weight_decay = 0;
  without.trainer.update({&batch, 1}, optimizer, 1e-2);
  optimizer.weight_decay = 1;
  with.trainer.update({&batch, 1}, optimizer, 1e-2);
  const Trainer::State state = with.trainer.state();
  for (const std::string& name : state.parameters.names()) {
    const bool matrix = name.ends_with("proj.weight") || name.ends_with("fc1.weight") ||
                        name.ends_with("fc2.weight") || name.ends_with("embedding.weight") ||
                        name == "lm_head.weight" || name.find("mimo_") != std::string::npos;
    EXPECT_EQ(!same_bits(with.weight(name), without.weight(name)), matrix) << name;
  }
}

TEST(Trainer, NothingChangesWhenTheGradientIsNotFinite) {
  testing::Random random(5);
  const Batch batch = random_batch(random, 2, 16);
  Fixture f, untouched;
  for (Fixture* each : {&f, &untouched}) each->trainer.update({&batch, 1}, {}, 1e-3);
  float& poisoned = f.weight("backbone.norm_f.weight").as<float>()[0];
  const float healthy = poisoned;
  poisoned = std::numeric_limits<float>::quiet_NaN();
  const Update update = f.trainer.update({&batch, 1}, {}, 1e-3);
  EXPECT_FALSE(update.applied);
  EXPECT_FALSE(std::isfinite(update.loss));
  EXPECT_FALSE(std::isfinite(update.grad_norm));
  EXPECT_EQ(f.trainer.state().updates, 1);
  poisoned = healthy;
  const Trainer::State state = f.trainer.state();
  for (const std::string& name : state.parameters.names()) {
    EXPECT_TRUE(same_bits(f.weight(name), untouched.weight(name))) << name;
    EXPECT_TRUE(same_bits(f.trainer.state().m.at(name), untouched.trainer.state().m.at(name)));
    EXPECT_TRUE(same_bits(f.trainer.state().v.at(name), untouched.trainer.state().v.at(name)));
  }
  // And training goes on as if the bad batch had not been.
  EXPECT_TRUE(f.trainer.update({&batch, 1}, {}, 1e-3).applied);
  untouched.trainer.update({&batch, 1}, {}, 1e-3);
  EXPECT_TRUE(same_bits(f.weight("lm_head.weight"), untouched.weight("lm_head.weight")));
}

TEST(Trainer, TheNumberOfThreadsDoesNotMatter) {
  testing::Random random(6);
  const Batch batch = random_batch(random, 4, 33);
  Fixture one(tiny_config(), 1), three(tiny_config(), 3);
  for (int i = 0; i < 3; ++i) {
    const Update a = one.trainer.update({&batch, 1}, {}, 1e-2);
    const Update b = three.trainer.update({&batch, 1}, {}, 1e-2);
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.grad_norm, b.grad_norm);
  }
  const Trainer::State state = one.trainer.state();
  for (const std::string& name : state.parameters.names()) {
    EXPECT_TRUE(same_bits(one.weight(name), three.weight(name))) << name;
  }
}

TEST(Trainer, RefusesWhatCannotBeTrained) {
  testing::Random random(7);
  Batch batch = random_batch(random, 1, 4);
  Fixture f;
  std::ranges::fill(batch.targets, -1);
  EXPECT_THROW(f.trainer.update({&batch, 1}, {}, 1e-3), InputError);
  const Batch large = random_batch(random, 1, 257);
  EXPECT_THROW(f.trainer.update({&large, 1}, {}, 1e-3), InputError);
  EXPECT_THROW((OptimizerSettings{.beta1 = 1}.check()), InputError);
  EXPECT_THROW((OptimizerSettings{.eps = 0}.check()), InputError);
  EXPECT_THROW((OptimizerSettings{.weight_decay = -1}.check()), InputError);
  EXPECT_THROW((OptimizerSettings{.clip = -1}.check()), InputError);
}

// The reference for accuracy: a model that has learnt one batch by heart knows it.
TEST(Evaluate, CountsCorrectAnswersOfTheScoredTokens) {
  testing::Random random(8);
  Batch batch = random_batch(random, 2, 16);
  Fixture f;
  const auto evaluated = [&] {
    const NamedTensors activations = allocate(activation_table(f.config, 32, Keep::nothing));
    return evaluate(f.ctx, f.trainer.model(), activations, batch, true);
  };
  const double untrained = evaluated().loss();
  for (int i = 0; i < 80; ++i) f.trainer.update({&batch, 1}, {}, 1e-2);
  EXPECT_EQ(evaluated().correct, 32);
  EXPECT_LT(evaluated().loss(), 0.05 * untrained);
  batch.targets[3] = (batch.targets[3] + 1) % 20;
  batch.targets[4] = -1;
  EXPECT_EQ(evaluated().scored, 31);
  EXPECT_EQ(evaluated().correct, 30);
  EXPECT_DOUBLE_EQ(evaluated().accuracy(), 30.0 / 31);
}

}  // namespace
}  // namespace mamba3
