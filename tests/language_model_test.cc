#include "model/language_model.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <numeric>

#include "support/compare.h"
#include "support/errors.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

// A model with what one call needs, and how to make calls short to write.
class Runner {
 public:
  explicit Runner(const Config& config, uint64_t seed = 7) : model_(tiny_model(config, seed)) {}

  const LanguageModel& model() const { return model_; }
  Context& context() { return ctx_; }

  // Logits (B T, V) of ids (B, T).
  Tensor logits(const View& ids, const StateBatch* state = nullptr, const View& cu_seqlens = {}) {
    const int64_t M = ids.size();
    const NamedTensors memory = allocate(activation_table(model_.config, M, Keep::nothing));
    const ModelActivations activations = resolve_activations(model_.config, memory, M);
    model_forward(
        ctx_, model_,
        {.ids = ids, .cu_seqlens = cu_seqlens, .activations = activations, .state = state});
    Tensor out({M, model_.config.vocab_padded});
    model_logits(ctx_, model_, activations.hidden, out);
    return out;
  }

  // The gradients of the summed loss of predicting `targets` (M).
  TinyGradients gradients(const View& ids, const View& targets, const View& cu_seqlens = {}) {
    const int64_t M = ids.size();
    const NamedTensors memory = allocate(activation_table(model_.config, M, Keep::for_backward));
    const ModelActivations activations = resolve_activations(model_.config, memory, M);
    TinyGradients gradients = tiny_gradients(model_.config);
    Tensor nll({M});
    model_forward(ctx_, model_, {.ids = ids, .cu_seqlens = cu_seqlens, .activations = activations});
    model_loss(ctx_, model_,
               {.activations = activations,
                .targets = targets,
                .nll = nll,
                .gradients = &gradients.views});
    model_backward(ctx_, model_,
                   {.ids = ids,
                    .cu_seqlens = cu_seqlens,
                    .activations = activations,
                    .gradients = gradients.views});
    return gradients;
  }

 private:
  Context ctx_{2};
  LanguageModel model_;
};

::testing::AssertionResult close(const View& got, const View& want) {
  const std::vector<double> values = values_of(want);
  return near(got, values, {.unit = 1e-5, .terms = 64});
}

// The same angle may come out as 0 or as 2 pi less a rounding.
::testing::AssertionResult close_angles(const View& got, const View& want) {
  constexpr double turn = 2 * std::numbers::pi;
  for (int64_t i = 0; i < want.size(); ++i) {
    const double difference = std::remainder(value_of(got, i) - value_of(want, i), turn);
    if (!(std::abs(difference) < 1e-4))
      return ::testing::AssertionFailure() << "angle " << i << " differs by " << difference;
  }
  return ::testing::AssertionSuccess();
}

::testing::AssertionResult close_states(const StatePool& got, const StatePool& want) {
  for (const std::string& name : want.tensors().names()) {
    if (name.find("cache") != std::string::npos) continue;  // of different capacities
    const View a = got.tensors().at(name), b = want.tensors().at(name);
    const auto result = name.ends_with("angle") ? close_angles(a, b) : close(a, b);
    if (!result) return ::testing::AssertionFailure() << name << ": " << result.message();
  }
  return ::testing::AssertionSuccess();
}

std::vector<int32_t> first_rows(int64_t n) {
  std::vector<int32_t> rows(static_cast<size_t>(n));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

class LanguageModelInvariants : public ::testing::TestWithParam<TinyConfig> {
 protected:
  const Config& config() const { return GetParam().config; }
  Tensor ids(std::initializer_list<int64_t> dims) {
    return Tensor::integers(random_, dims, 0, config().vocab);
  }
  // Feeds ids (B, T) in pieces of the given lengths and returns the logits (B, T, V).
  Tensor in_pieces(Runner& runner, StatePool& pool, const View& tokens,
                   const std::vector<int64_t>& lengths) {
    const int64_t B = tokens.dim(0), V = config().vocab_padded;
    Tensor out({B, tokens.dim(1), V});
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      pool.reserve(begin + length);
      StateBatch batch = pool.select(first_rows(B));
      Tensor piece({B, length}, DType::i32);
      for (int64_t i = 0; i < B * length; ++i)
        piece.set(i, value_of(tokens.slice(1, begin, begin + length), i));
      const Tensor logits = runner.logits(piece, &batch);
      for (int64_t i = 0; i < logits.view().size(); ++i)
        set_value(out.view().slice(1, begin, begin + length), i, logits.at(i));
      pool.advance(batch, length);
      begin += length;
    }
    return out;
  }

  Random random_{11};
};

INSTANTIATE_TEST_SUITE_P(Tiny, LanguageModelInvariants, ::testing::ValuesIn(tiny_configs()),
                         tiny_test_name);

TEST_P(LanguageModelInvariants, StepsEqualOneScan) {
  Runner runner(config());
  const Tensor tokens = ids({2, 13});
  StatePool scanned(runner.context(), config(), 2), stepped(runner.context(), config(), 2);
  const Tensor want = in_pieces(runner, scanned, tokens, {13});
  const Tensor got = in_pieces(runner, stepped, tokens, std::vector<int64_t>(13, 1));
  EXPECT_TRUE(close(got, want));
  EXPECT_TRUE(close_states(stepped, scanned));
  EXPECT_EQ(stepped.length(1), 13);
}

TEST_P(LanguageModelInvariants, TwoScansEqualOne) {
  Runner runner(config());
  const Tensor tokens = ids({2, 70});
  StatePool one(runner.context(), config(), 2), two(runner.context(), config(), 2);
  const Tensor want = in_pieces(runner, one, tokens, {70});
  const Tensor got = in_pieces(runner, two, tokens, {5, 65});
  EXPECT_TRUE(close(got, want));
  EXPECT_TRUE(close_states(two, one));
}

TEST_P(LanguageModelInvariants, AStateChangesNothingInOnePass) {
  Runner runner(config());
  const Tensor tokens = ids({2, 20});
  StatePool pool(runner.context(), config(), 2);
  const Tensor got = in_pieces(runner, pool, tokens, {20});
  EXPECT_TRUE(close(got.view().reshape({40, config().vocab_padded}), runner.logits(tokens)));
}

TEST_P(LanguageModelInvariants, ARowEqualsThatRowAlone) {
  Runner runner(config());
  const Tensor tokens = ids({3, 19});
  const Tensor together = runner.logits(tokens);
  for (int64_t b = 0; b < 3; ++b) {
    const Tensor alone = runner.logits(tokens.view().slice(0, b, b + 1));
    EXPECT_TRUE(close(together.view().slice(0, 19 * b, 19 * (b + 1)), alone)) << "row " << b;
  }
}

// The error of who forgets it; Read.* has what is computed with it.
TEST(LanguageModel, PackedAttentionThatContinuesNeedsTheLengthsOnTheHost) {
  const Config config = tiny_config("hybrid");
  Runner runner(config);
  Context ctx(1);
  StatePool pool(ctx, config, 2, 8);
  const StateBatch batch = pool.select(first_rows(2));
  const Tensor tokens = Tensor::of_ids({1, 2, 3});
  const Tensor cu_seqlens = Tensor::of_ids({0, 1, 3});
  EXPECT_EQ(error_of([&] {
              runner.logits(tokens.view().reshape({1, 3}), &batch, cu_seqlens);
            }),
            "[model] attention over packed sequences with a state needs cu_seqlens in host memory");
}

TEST_P(LanguageModelInvariants, PackedSequencesEqualSeparateOnes) {
  Runner runner(config());
  const Tensor tokens = ids({1, 41});
  const Tensor targets = Tensor::integers(random_, {41}, 0, config().vocab);
  const Tensor cu_seqlens = Tensor::of_ids({0, 1, 1, 30, 41});
  const Tensor packed = runner.logits(tokens, nullptr, cu_seqlens);
  const TinyGradients packed_gradients = runner.gradients(tokens, targets, cu_seqlens);
  TinyGradients sum = tiny_gradients(config());
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 30}, {30, 41}}) {
    const View part = tokens.view().slice(1, begin, end);
    EXPECT_TRUE(close(packed.view().slice(0, begin, end), runner.logits(part)));
    const TinyGradients separate = runner.gradients(part, targets.view().slice(0, begin, end));
    for (const std::string& name : sum.tensors.names()) {
      const View total = sum.tensors.at(name), one = separate.tensors.at(name);
      for (int64_t i = 0; i < total.size(); ++i) total.as<float>()[i] += one.as<float>()[i];
    }
  }
  for (const std::string& name : sum.tensors.names()) {
    EXPECT_TRUE(near(packed_gradients.tensors.at(name), values_of(sum.tensors.at(name)),
                     {.unit = 1e-5, .terms = 41}))
        << name;
  }
}

// The loss must fall along its gradient as fast as the gradient says, and not otherwise.
TEST_P(LanguageModelInvariants, GradientsAreTheSlopeOfTheLoss) {
  const Tensor tokens = ids({2, 12});
  const Tensor targets = Tensor::integers(random_, {24}, 0, config().vocab);
  Runner runner(config());
  const TinyGradients gradients = runner.gradients(tokens, targets);
  const auto loss = [&] {
    const Tensor logits = runner.logits(tokens);
    double sum = 0;
    for (int64_t m = 0; m < 24; ++m) {
      double largest = -INFINITY, total = 0;
      for (int64_t v = 0; v < config().vocab; ++v)
        largest = std::max(largest, logits.at(m * config().vocab_padded + v));
      for (int64_t v = 0; v < config().vocab; ++v)
        total += std::exp(logits.at(m * config().vocab_padded + v) - largest);
      const auto target = static_cast<int64_t>(targets.at(m));
      sum += largest + std::log(total) - logits.at(m * config().vocab_padded + target);
    }
    return sum;
  };
  for (const std::string& name : gradients.tensors.names()) {
    const View gradient = gradients.tensors.at(name);
    const View parameter = runner.model().tensors.at(name);
    double square = 0;
    for (const double g : values_of(gradient)) square += g * g;
    const double norm = std::sqrt(square);
    ASSERT_GT(norm, 0) << name;
    const std::vector<double> before = values_of(parameter);
    const auto moved = [&](double by) {
      for (int64_t i = 0; i < parameter.size(); ++i)
        set_value(parameter, i, before[static_cast<size_t>(i)] + by * value_of(gradient, i) / norm);
      return loss();
    };
    const auto slope_over = [&](double step) { return (moved(step) - moved(-step)) / (2 * step); };
    // Steps that change the loss by about 0.04 and 0.02: f32 rounding is a thousandth of that, and
    // together they cancel the third derivative.
    const double step = 0.02 / norm;
    const double slope = (4 * slope_over(step / 2) - slope_over(step)) / 3;
    moved(0);
    EXPECT_NEAR(slope / norm, 1, 0.03) << name;
  }
}

TEST(LanguageModel, GradientsAccumulate) {
  const Config config = tiny_config("hybrid");
  Runner runner(config);
  Random random(3);
  const Tensor tokens = Tensor::integers(random, {1, 9}, 0, config.vocab);
  const Tensor targets = Tensor::integers(random, {9}, 0, config.vocab);
  const NamedTensors memory = allocate(activation_table(config, 9, Keep::for_backward));
  const ModelActivations activations = resolve_activations(config, memory, 9);
  TinyGradients twice = tiny_gradients(config);
  for (int pass = 0; pass < 2; ++pass) {
    Tensor nll({9});
    model_forward(runner.context(), runner.model(), {.ids = tokens, .activations = activations});
    model_loss(
        runner.context(), runner.model(),
        {.activations = activations, .targets = targets, .nll = nll, .gradients = &twice.views});
    model_backward(runner.context(), runner.model(),
                   {.ids = tokens, .activations = activations, .gradients = twice.views});
  }
  const TinyGradients once = runner.gradients(tokens, targets);
  for (const std::string& name : once.tensors.names()) {
    std::vector<double> want = values_of(once.tensors.at(name));
    for (double& value : want) value *= 2;
    EXPECT_TRUE(near(twice.tensors.at(name), want, {.unit = 1e-6, .terms = 9})) << name;
  }
}

// 16-bit checkpoints keep their matrices and get their small tensors as f32.
TEST(LanguageModel, ConvertsSmallTensorsOnce) {
  const Config config = tiny_config("groups");
  const NamedTensors source = tiny_parameters(config, 5);
  NamedTensors halved;
  std::vector<Tensor> storage;
  for (const std::string& name : source.names()) {
    const View view = source.at(name);
    storage.push_back(Tensor::of({view.size()}, values_of(view), DType::bf16));
    const std::span<const int64_t> dims(view.dims.data(), static_cast<size_t>(view.rank));
    halved.add(name, make_view(storage.back().view().data, DType::bf16, dims));
  }
  const LanguageModel model = make_language_model(config, halved);
  EXPECT_EQ(model.weights.head.dtype, DType::bf16);
  EXPECT_EQ(model.weights.head.data, halved.at("lm_head.weight").data);
  EXPECT_EQ(model.weights.blocks[0].fc1.dtype, DType::bf16);
  EXPECT_EQ(model.weights.blocks[1].in_proj.data,
            halved.at("backbone.layers.1.mixer.in_proj.weight").data);
  const View& dt_bias = model.weights.blocks[1].mixer.dt_bias;
  EXPECT_EQ(dt_bias.dtype, DType::f32);
  EXPECT_EQ(values_of(dt_bias), values_of(halved.at("backbone.layers.1.mixer.dt_bias")));
  EXPECT_EQ(model.weights.norm_f.dtype, DType::f32);
}

// What an optimiser does to the tensors is what the model then uses.
TEST(LanguageModel, SharesF32Parameters) {
  const Config config = tiny_config("siso");
  const NamedTensors parameters = tiny_parameters(config, 5);
  const LanguageModel model = make_language_model(config, parameters);
  EXPECT_EQ(model.weights.norm_f.data, parameters.at("backbone.norm_f.weight").data);
  EXPECT_EQ(model.weights.head.data, parameters.at("backbone.embedding.weight").data);
}

TEST(LanguageModel, CopiesTheStreamAfterEachLayer) {
  const Config config = tiny_config("siso");
  Runner runner(config);
  Random random(4);
  const Tensor tokens = Tensor::integers(random, {1, 6}, 0, config.vocab);
  const NamedTensors memory = allocate(activation_table(config, 6, Keep::nothing));
  const ModelActivations activations = resolve_activations(config, memory, 6);
  Tensor first({6, config.D}), last({6, config.D});
  model_forward(runner.context(), runner.model(),
                {.ids = tokens, .activations = activations, .residuals = {first, last}});
  EXPECT_TRUE(same_bits(last, activations.residual));
  EXPECT_FALSE(same_bits(first, last));
}

TEST(LanguageModel, SaysWhatIsWrong) {
  const Config config = tiny_config("siso");
  Runner runner(config);
  Context& ctx = runner.context();
  const NamedTensors memory = allocate(activation_table(config, 4, Keep::nothing));
  const ModelActivations activations = resolve_activations(config, memory, 4);
  const auto forward = [&](const Tensor& ids) {
    model_forward(ctx, runner.model(), {.ids = ids, .activations = activations});
  };
  EXPECT_EQ(input_error_of([&] {
              forward(Tensor::of_ids({1, 2, 3, 4}));
            }),
            "[model] ids: got shape (4), want (B, T) with at least one token");
  EXPECT_EQ(input_error_of([&] {
              forward(Tensor::zeros({1, 5}, DType::i32));
            }),
            "[model] the activations are for 4 tokens, but ids has 5");
  EXPECT_EQ(input_error_of([&] { resolve_activations(config, memory, 5); }),
            "[model] activations for 5 tokens: there is room for 4");
  const TinyGradients gradients = tiny_gradients(config);
  EXPECT_EQ(input_error_of([&] {
              model_backward(ctx, runner.model(),
                             {.ids = Tensor::zeros({1, 4}, DType::i32),
                              .activations = activations,
                              .gradients = gradients.views});
            }),
            "[model] the backward needs activations made with Keep::for_backward");
  NamedTensors incomplete;
  incomplete.add("backbone.embedding.weight", runner.model().weights.embedding);
  EXPECT_NE(input_error_of([&] {
              make_language_model(config, incomplete);
            }).find("backbone.layers.0.norm.weight"),
            std::string::npos);
}

}  // namespace
}  // namespace mamba3::testing
