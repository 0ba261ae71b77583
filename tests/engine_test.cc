#include "infer/engine.h"

#include <gtest/gtest.h>

#include <cmath>

#include "infer/perplexity.h"
#include "support/compare.h"
#include "support/errors.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

constexpr Tolerance kClose{.unit = 1e-5, .terms = 64};

class EngineOf : public ::testing::TestWithParam<TinyConfig> {
 protected:
  LanguageModel model_ = tiny_model(GetParam().config, 3);
  Random random_{17};
};

INSTANTIATE_TEST_SUITE_P(Tiny, EngineOf, ::testing::ValuesIn(tiny_configs()), tiny_test_name);

// A prompt of more than one piece, against the model in one call.
TEST_P(EngineOf, RunsLongPromptsInPieces) {
  const Config& config = model_.config;
  const int64_t T = Engine::kPieceTokens / 2 + 37, V = config.vocab_padded;
  const Tensor ids = Tensor::integers(random_, {2, T}, 0, config.vocab);
  Engine engine(model_, 2, 2);
  Tensor got({2, T, V}), want({2 * T, V});
  engine.append(ids, got);
  EXPECT_EQ(engine.length(), T);

  const NamedTensors memory = allocate(activation_table(config, 2 * T, Keep::nothing));
  const ModelActivations activations = resolve_activations(config, memory, 2 * T);
  model_forward(engine.context(), model_, {.ids = ids, .activations = activations});
  model_logits(engine.context(), model_, activations.hidden, want);
  EXPECT_TRUE(near(got.view().reshape({2 * T, V}), want.values(), kClose));

  Tensor last({2, V});
  engine.last_logits(last);
  for (int64_t b = 0; b < 2; ++b) {
    EXPECT_TRUE(near(last.view().select(0, b), values_of(got.view().select(0, b).select(0, T - 1)),
                     kClose));
  }
}

TEST_P(EngineOf, AllocatesNothingInSteadyState) {
  Engine engine(model_, 1, 2);
  engine.reserve(100);  // caches grow by doubling, which is not what this is about
  Tensor logits({1, model_.config.vocab_padded});
  const auto step = [&] {
    engine.append(Tensor::of_ids({5}).view().reshape({1, 1}));
    engine.last_logits(logits);
  };
  engine.append(Tensor::integers(random_, {1, 20}, 0, model_.config.vocab));
  for (int i = 0; i < 3; ++i) step();
  const int64_t before = engine.context().scratch.allocations();
  for (int i = 0; i < 50; ++i) step();
  EXPECT_EQ(engine.context().scratch.allocations(), before);
}

TEST_P(EngineOf, ResetGoesBackToTheStart) {
  Engine used(model_), fresh(model_);
  const Tensor ids = Tensor::integers(random_, {1, 9}, 0, model_.config.vocab);
  Tensor first({1, 9, model_.config.vocab_padded}), second({1, 9, model_.config.vocab_padded});
  used.append(Tensor::of_ids({1, 2, 3}).view().reshape({1, 3}));
  used.reset();
  EXPECT_EQ(used.length(), 0);
  used.append(ids, first);
  fresh.append(ids, second);
  EXPECT_TRUE(same_bits(first, second));
}

TEST(Engine, RefusesIdsThatDoNotExist) {
  const LanguageModel model = tiny_model(tiny_config("siso"), 3);  // 61 ids, 64 rows
  Engine one(model), two(model, 2);
  EXPECT_EQ(input_error_of([&] {
              one.append(Tensor::of_ids({1, 61}).view().reshape({1, 2}));
            }),
            "token id 61 at position 1 is out of range: this model knows 0 to 60");
  EXPECT_EQ(input_error_of([&] {
              two.append(Tensor::of_ids({1, 2, 3, -4}).view().reshape({2, 2}));
            }),
            "token id -4 at position 1 of sequence 1 is out of range: this model knows 0 to 60");
  EXPECT_EQ(input_error_of([&] {
              two.append(Tensor::of_ids({1, 2}).view().reshape({1, 2}));
            }),
            "token ids: got shape (1, 2), want (2, T) with at least one token");
  Tensor logits({1, 64});
  EXPECT_EQ(input_error_of([&] { one.last_logits(logits); }),
            "there are no logits before the first token");
  EXPECT_EQ(one.length(), 0);
}

// -log p of every token but the first, from the logits.
double nats_by_hand(const LanguageModel& model, const Tensor& ids) {
  const int64_t T = ids.view().dim(0), V = model.config.vocab_padded;
  Engine engine(model);
  Tensor logits({1, T, V});
  engine.append(ids.view().reshape({1, T}), logits);
  double nats = 0;
  for (int64_t t = 0; t + 1 < T; ++t) {
    double sum = 0;
    for (int64_t v = 0; v < model.config.vocab; ++v) sum += std::exp(logits.at(t * V + v));
    nats += std::log(sum) - logits.at(t * V + static_cast<int64_t>(ids.at(t + 1)));
  }
  return nats;
}

std::span<const int32_t> span_of(const View& ids) {
  return {ids.as<int32_t>(), static_cast<size_t>(ids.size())};
}

TEST(Perplexity, ScoresEveryTokenButTheFirst) {
  const LanguageModel model = tiny_model(tiny_config("groups"), 3);
  Random random(5);
  const Tensor ids = Tensor::integers(random, {50}, 0, model.config.vocab);
  Engine engine(model);
  const Perplexity result = perplexity(engine, span_of(ids), {.context = 2048});
  EXPECT_EQ(result.tokens, 49);
  EXPECT_NEAR(result.nats, nats_by_hand(model, ids), 1e-3);
  EXPECT_DOUBLE_EQ(result.nats_per_token(), result.nats / 49);
  EXPECT_DOUBLE_EQ(result.perplexity(), std::exp(result.nats / 49));
  EXPECT_DOUBLE_EQ(result.bits_per_byte(98), result.nats / std::log(2) / 98);
}

TEST(Perplexity, WindowsAreIndependentUnlessTheStateIsCarried) {
  const LanguageModel model = tiny_model(tiny_config("hybrid"), 3);
  Random random(5);
  const Tensor ids = Tensor::integers(random, {31}, 0, model.config.vocab);
  Engine engine(model);
  std::vector<int64_t> heard;
  const Perplexity windows = perplexity(engine, span_of(ids), {.context = 12},
                                        [&](int64_t scored) { heard.push_back(scored); });
  double nats = 0;
  for (const auto& [begin, end] : {std::pair{0, 13}, {12, 25}, {24, 31}}) {
    const View part = ids.view().slice(0, begin, end);
    nats += nats_by_hand(model, Tensor::of({end - begin}, values_of(part), DType::i32));
  }
  EXPECT_EQ(windows.tokens, 30);
  EXPECT_NEAR(windows.nats, nats, 1e-3);
  EXPECT_EQ(heard, (std::vector<int64_t>{12, 24, 30}));

  const Perplexity carried = perplexity(engine, span_of(ids), {.context = 12, .carry_state = true});
  EXPECT_NEAR(carried.nats, nats_by_hand(model, ids), 1e-3);
  EXPECT_GT(std::abs(carried.nats - windows.nats), 0.1);
}

TEST(Perplexity, NeedsTwoTokens) {
  const LanguageModel model = tiny_model(tiny_config("siso"), 3);
  Engine engine(model);
  const std::vector<int32_t> one = {1};
  EXPECT_EQ(input_error_of([&] { perplexity(engine, one, {}); }),
            "perplexity needs at least two tokens, and the text has 1");
  EXPECT_EQ(input_error_of([&] { perplexity(engine, one, {.context = 0}); }),
            "the context must be positive, got 0");
}

}  // namespace
}  // namespace mamba3::testing
