// Decoding on either device: recorded steps against single calls.

#include <gtest/gtest.h>

#include <cmath>

#include "infer/engine.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

LanguageModel placed(const LanguageModel& model) {
  if (test_device() == Device::cpu) return model;
  Context ctx(1, test_device());
  return place_language_model(ctx, model, DType::f32);
}

View ids_of(const std::vector<int32_t>& ids, int64_t B) {
  return view_of(ids.data(), {B, std::ssize(ids) / B});
}

std::vector<int32_t> random_ids(Random& random, int64_t n, int64_t vocab) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(random.integer(0, vocab)));
  return ids;
}

std::vector<int32_t> decoded(Engine& engine, const SampleArgs& args) {
  std::vector<int32_t> out;
  engine.decode(args, [&](std::span<const int32_t> ids) { out.assign(ids.begin(), ids.end()); });
  return out;
}

// The same by single calls.
std::vector<int32_t> drawn(Engine& engine, SampleArgs args) {
  args.position = static_cast<uint64_t>(engine.length());
  const std::vector<int32_t> ids = engine.draw(args);
  engine.append(ids_of(ids, engine.sequences()));
  return ids;
}

std::vector<float> logits_of(Engine& engine) {
  const int64_t B = engine.sequences(), V = engine.model().config.vocab_padded;
  std::vector<float> logits(static_cast<size_t>(B * V));
  engine.last_logits(view_of(logits.data(), {B, V}));
  return logits;
}

class Decode : public ::testing::TestWithParam<TinyConfig> {
 protected:
  LanguageModel model_ = placed(tiny_model(GetParam().config, 3));
  Random random_{19};
};

INSTANTIATE_TEST_SUITE_P(Tiny, Decode, ::testing::ValuesIn(tiny_configs()), tiny_test_name);

// Long enough for the caches of a hybrid to grow several times, with other calls between.
TEST_P(Decode, EqualsSingleCalls) {
  const int64_t vocab = model_.config.vocab;
  for (const int64_t B : {1, 3}) {
    Engine recorded(model_, B, 2), single(model_, B, 2);
    const auto append = [&](int64_t T) {
      const std::vector<int32_t> ids = random_ids(random_, B * T, vocab);
      recorded.append(ids_of(ids, B));
      single.append(ids_of(ids, B));
    };
    const auto decode = [&](int64_t n, const SampleArgs& args) {
      for (int64_t i = 0; i < n; ++i) {
        ASSERT_EQ(decoded(recorded, args), drawn(single, args)) << "B " << B << " token " << i;
      }
      EXPECT_EQ(recorded.length(), single.length());
      EXPECT_EQ(logits_of(recorded), logits_of(single));
    };
    append(5);
    decode(20, {.vocab = vocab, .seed = 4});
    append(30);
    decode(10, {.vocab = vocab, .seed = 4});
    decode(10, {.vocab = vocab, .temperature = 0.7f, .top_k = 7, .top_p = 0.9f, .seed = 5});
    const std::vector<int32_t> history = random_ids(random_, B * 8, vocab);
    decode(10, {.vocab = vocab, .history = ids_of(history, B), .repeat_penalty = 2});
    recorded.reset();
    single.reset();
    append(3);
    decode(10, {.vocab = vocab, .temperature = 0});
  }
}

TEST_P(Decode, TokensAreAppendedEvenIfTheCallerThrows) {
  Engine engine(model_), same(model_);
  for (Engine* each : {&engine, &same}) each->append(ids_of({1, 2, 3}, 1));
  const SampleArgs args{.vocab = model_.config.vocab, .seed = 4};
  EXPECT_THROW(engine.decode(args, [](auto) { throw std::runtime_error("enough"); }),
               std::runtime_error);
  EXPECT_EQ(engine.length(), 4);
  decoded(same, args);
  EXPECT_EQ(logits_of(engine), logits_of(same));
}

TEST(DecodeErrors, NeedTokensAndFiniteLogits) {
  const Config config = tiny_config("siso");
  NamedTensors parameters = tiny_parameters(config, 3);
  const LanguageModel sound = placed(make_language_model(config, parameters));
  Engine empty(sound);
  EXPECT_EQ(input_error_of([&] { decoded(empty, {.vocab = config.vocab}); }),
            "there are no logits before the first token");
  parameters.at("backbone.norm_f.weight").as<float>()[0] = std::nanf("");
  const LanguageModel damaged = placed(make_language_model(config, parameters));
  Engine engine(damaged);
  engine.append(ids_of({1, 2, 3}, 1));
  EXPECT_NE(error_of([&] { decoded(engine, {.vocab = config.vocab}); }).find("not finite"),
            std::string::npos);
}

}  // namespace
}  // namespace mamba3::testing
