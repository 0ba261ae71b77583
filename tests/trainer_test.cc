#include "train/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <memory>

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

// Where the tests run: on the GPU steps are recorded and replayed.
struct SomeSteps {
  Context ctx = testing::make_context(2);
  Config config = tiny_config();
  Trainer::State start = Trainer::fresh_state(config, init_parameters(ctx, config, 3));
  testing::Random random{9};

  // A state of its own: on the CPU it is updated in place.
  Trainer::State copy_of_start() const { return Trainer::fresh_state(config, start.parameters); }
  // Not all tokens are scored.
  Batch batch(int64_t B, int64_t T) {
    Batch made = random_batch(random, B, T);
    for (int32_t& target : made.targets) {
      if (random.below(4) == 0) target = -1;
    }
    return made;
  }
};

void expect_same_state(const Trainer& a, const Trainer& b) {
  const Trainer::State one = a.state(), two = b.state();
  EXPECT_EQ(one.updates, two.updates);
  for (const std::string& name : one.parameters.names()) {
    EXPECT_TRUE(same_bits(one.parameters.at(name), two.parameters.at(name))) << name;
    EXPECT_TRUE(same_bits(one.m.at(name), two.m.at(name))) << name;
    EXPECT_TRUE(same_bits(one.v.at(name), two.v.at(name))) << name;
  }
}

// Against a trainer made anew for each step, which has nothing to replay. Lengths come and go, some
// longer than all before them, the number of micro batches and of scored tokens, the learning rate
// and in the end the settings change.
TEST(TrainerSteps, ReplayingChangesNoBit) {
  for (const DType dtype : testing::test_dtypes()) {
    SCOPED_TRACE(name_of(dtype));
    SomeSteps f;
    Trainer replaying(f.ctx, f.config, f.copy_of_start(), 160, dtype);
    auto anew = std::make_unique<Trainer>(f.ctx, f.config, f.copy_of_start(), 160, dtype);
    const int64_t lengths[] = {5, 5, 5, 5, 9, 5, 9, 9, 40, 5, 9, 40, 40, 40, 5, 5, 5, 5, 5, 5};
    for (int i = 0; i < 20; ++i) {
      SCOPED_TRACE(i);
      const int64_t T = lengths[i];
      std::vector<Batch> batches;
      for (int part = 0; part < (i < 10 ? 1 : i % 4); ++part) batches.push_back(f.batch(4, T));
      if (batches.empty()) batches.push_back(f.batch(2, T));
      OptimizerSettings optimizer;
      if (i >= 15) optimizer = {.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-4, .clip = 0.1};
      const double lr = 1e-3 * (i + 1);
      const Update got = replaying.update(batches, optimizer, lr);
      const Update want = anew->update(batches, optimizer, lr);
      EXPECT_TRUE(got.applied);
      EXPECT_EQ(got.loss, want.loss);
      EXPECT_EQ(got.grad_norm, want.grad_norm);
      anew = std::make_unique<Trainer>(f.ctx, f.config, anew->state(), 160, dtype);
    }
    expect_same_state(replaying, *anew);
  }
}

TEST(TrainerSteps, TheLossIsTheMeanOfTheEvaluation) {
  SomeSteps f;
  Trainer trainer(f.ctx, f.config, f.copy_of_start(), 160);
  const std::vector<Batch> batches = {f.batch(4, 10), f.batch(3, 10)};
  for (int i = 0; i < 4; ++i) {
    const NamedTensors activations =
        allocate(activation_table(f.config, 40, Keep::nothing), f.ctx.device);
    Evaluation before;
    for (const Batch& batch : batches)
      before += evaluate(f.ctx, trainer.model(), activations, batch, false);
    const double loss = trainer.update(batches, {}, 1e-2).loss;
    EXPECT_NEAR(loss, before.loss(), 1e-6 * loss);
  }
}

TEST(TrainerSteps, StartHasReadTheBatchesWhenItReturns) {
  SomeSteps f;
  Trainer halves(f.ctx, f.config, f.copy_of_start(), 64);
  Trainer whole(f.ctx, f.config, f.copy_of_start(), 64);
  for (int i = 0; i < 5; ++i) {
    std::vector<Batch> batches = {f.batch(2, 16), f.batch(2, 16)};
    const Update want = whole.update(batches, {}, 1e-2);
    halves.start(batches, {}, 1e-2);
    for (Batch& batch : batches) batch = f.batch(1, 7);
    EXPECT_EQ(halves.finish().loss, want.loss);
  }
  expect_same_state(halves, whole);
}

// Whether a step is recorded, replayed or simply run.
TEST(TrainerSteps, NothingChangesWhenTheLossIsNotFinite) {
  SomeSteps f;
  const Trainer::State poisoned = f.copy_of_start();
  poisoned.parameters.at("backbone.norm_f.weight").as<float>()[0] =
      std::numeric_limits<float>::quiet_NaN();
  Trainer untouched(f.ctx, f.config, f.copy_of_start(), 64);
  Trainer trainer(f.ctx, f.config, poisoned, 64);
  for (int i = 0; i < 4; ++i) {
    const Batch batch = f.batch(2, 16);
    const Update update = trainer.update({&batch, 1}, {}, 1e-2);
    EXPECT_FALSE(update.applied);
    EXPECT_FALSE(std::isfinite(update.loss));
    EXPECT_FALSE(std::isfinite(update.grad_norm));
  }
  const Trainer::State state = trainer.state(), want = untouched.state();
  EXPECT_EQ(state.updates, 0);
  for (const std::string& name : state.parameters.names()) {
    EXPECT_TRUE(same_bits(state.m.at(name), want.m.at(name))) << name;
    EXPECT_TRUE(same_bits(state.v.at(name), want.v.at(name))) << name;
    if (name == "backbone.norm_f.weight") continue;
    EXPECT_TRUE(same_bits(state.parameters.at(name), want.parameters.at(name))) << name;
  }
}

// A target that does not exist gives a loss of NaN on the GPU, and a gradient that is finite.
TEST(TrainerSteps, GoOnAfterABadBatch) {
  if (testing::test_device() == Device::cpu) GTEST_SKIP() << "the CPU refuses such a target";
  SomeSteps f;
  Trainer with(f.ctx, f.config, f.copy_of_start(), 64);
  Trainer without(f.ctx, f.config, f.copy_of_start(), 64);
  for (int i = 0; i < 8; ++i) {
    const Batch good = f.batch(2, 16);
    Batch bad = f.batch(2, 16);
    bad.targets[3] = 1000;
    if (i % 3 != 1) {
      EXPECT_FALSE(with.update({&bad, 1}, {}, 1e-2).applied);
    }
    const Update want = without.update({&good, 1}, {}, 1e-2);
    EXPECT_EQ(with.update({&good, 1}, {}, 1e-2).loss, want.loss);
  }
  expect_same_state(with, without);
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
