// Prompts that are read together, on either device, against the same one by one.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "infer/engine.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

constexpr Tolerance kClose{.unit = 1e-5, .terms = 64};

using Prompts = std::vector<std::vector<int32_t>>;

LanguageModel placed(const LanguageModel& model) {
  if (test_device() == Device::cpu) return model;
  Context ctx(1, test_device());
  return place_language_model(ctx, model, DType::f32);
}

int64_t piece_tokens() {
  return test_device() == Device::cpu ? Engine::kPieceTokens : Engine::kGpuPieceTokens;
}

std::vector<std::span<const int32_t>> spans_of(const Prompts& prompts) {
  return {prompts.begin(), prompts.end()};
}

std::vector<float> logits_of(Engine& engine) {
  const int64_t B = engine.sequences(), V = engine.model().config.vocab_padded;
  std::vector<float> logits(static_cast<size_t>(B * V));
  engine.last_logits(view_of(logits.data(), {B, V}));
  return logits;
}

class Read : public ::testing::TestWithParam<TinyConfig> {
 protected:
  Prompts prompts(const std::vector<int64_t>& lengths) {
    Prompts out;
    for (const int64_t length : lengths) {
      out.emplace_back();
      for (int64_t t = 0; t < length; ++t) {
        out.back().push_back(static_cast<int32_t>(random_.integer(0, model_.config.vocab)));
      }
    }
    return out;
  }

  // Reads each of `calls` into these rows of an engine, together, and of another one by one; then
  // both continue. Everything that can be seen of them has to be the same.
  void expect_as_alone(const std::vector<int32_t>& rows, const std::vector<Prompts>& calls) {
    const int64_t n = *std::max_element(rows.begin(), rows.end()) + 2, V = model_.config.vocab;
    const int64_t V_padded = model_.config.vocab_padded;
    Engine together(model_, n, 2), apart(model_, n, 2);
    together.select(rows);
    for (const Prompts& call : calls) {
      together.read(spans_of(call));
      for (size_t b = 0; b < rows.size(); ++b) {
        apart.select({&rows[b], 1});
        const int64_t T = std::ssize(call[b]);  // with all logits: not by read()
        std::vector<float> logits(static_cast<size_t>(T * V_padded));
        apart.append(view_of(call[b].data(), {1, T}), view_of(logits.data(), {1, T, V_padded}));
      }
    }
    apart.select(rows);
    for (int step = 0; step < 3; ++step) {
      const std::vector<float> got = logits_of(together), want = logits_of(apart);
      for (size_t b = 0; b < rows.size(); ++b) {
        EXPECT_EQ(together.length(b), apart.length(b)) << "sequence " << b;
        const auto at = static_cast<int64_t>(b) * V_padded;
        const std::vector<double> row(want.begin() + at, want.begin() + at + V);
        EXPECT_TRUE(near(view_of(got.data() + at, {V}), row, kClose))
            << "sequence " << b << " step " << step;
      }
      // A token further, as generate_batch() goes on.
      for (Engine* engine : {&together, &apart}) {
        engine->decode({.vocab = V, .seed = 4}, [](std::span<const int32_t>) {});
      }
    }
  }

  LanguageModel model_ = placed(tiny_model(GetParam().config, 3));
  Random random_{23};
};

INSTANTIATE_TEST_SUITE_P(Tiny, Read, ::testing::ValuesIn(tiny_configs()), tiny_test_name);

TEST_P(Read, UnequalPromptsAreAsAlone) {
  expect_as_alone({0, 1, 2, 3, 4}, {prompts({5, 1, 70, 64, 131})});
}

TEST_P(Read, EqualPromptsAreAsAlone) {
  expect_as_alone({0, 1, 2}, {prompts({67, 67, 67})});
  expect_as_alone({0, 1, 2}, {prompts({1, 1, 1})});
}

// Rows of the pool in any order, some of them not selected; sequences that go on, each from a
// length of its own.
TEST_P(Read, SequencesGoOnInRowsInAnyOrder) {
  expect_as_alone({4, 0, 3, 1},
                  {prompts({9, 1, 33, 2}), prompts({7, 7, 7, 7}), prompts({1, 40, 1, 66})});
}

// Prompts longer than a forward, alone and between others, and more than fit one.
TEST_P(Read, LongPromptsAreCut) {
  const int64_t most = piece_tokens();
  expect_as_alone({2, 1, 0}, {prompts({3, most + 37, 20})});
  expect_as_alone({0, 1, 2}, {prompts({most / 2, most / 2 + 1, most})});
}

TEST(ReadErrors, SayWhatIsWrongBeforeAnythingChanges) {
  const LanguageModel model = placed(tiny_model(tiny_config("siso"), 3));
  Engine engine(model, 2);
  const auto read = [&](const Prompts& prompts) {
    return input_error_of([&] { engine.read(spans_of(prompts)); });
  };
  EXPECT_EQ(read({{1}}), "got 1 prompts for 2 sequences");
  EXPECT_EQ(read({{1}, {}}), "no tokens for sequence 1: give at least one");
  EXPECT_EQ(read({{1, 2, 3}, {4, 61}}),
            "token id 61 at position 1 of sequence 1 is out of range: this model knows 0 to 60");
  EXPECT_EQ(engine.length(0), 0);
  EXPECT_EQ(engine.length(1), 0);
}

TEST(ReadPlan, FillsForwardsWithWholePrompts) {
  using Plan = std::vector<std::vector<ReadPart>>;
  const auto plan = [](const std::vector<int64_t>& lengths) { return plan_reading(lengths, 10); };
  EXPECT_EQ(plan({}), Plan{});
  EXPECT_EQ(plan({3, 3, 3}), (Plan{{{0, 0, 3}, {1, 0, 3}, {2, 0, 3}}}));
  EXPECT_EQ(plan({5, 5, 1}), (Plan{{{0, 0, 5}, {1, 0, 5}}, {{2, 0, 1}}}));
  EXPECT_EQ(plan({4, 7, 3}), (Plan{{{0, 0, 4}}, {{1, 0, 7}, {2, 0, 3}}}));
  EXPECT_EQ(
      plan({2, 23, 7, 10}),
      (Plan{{{0, 0, 2}}, {{1, 0, 10}}, {{1, 10, 10}}, {{1, 20, 3}, {2, 0, 7}}, {{3, 0, 10}}}));
}

// Reading anew what was read before takes no more memory.
TEST_P(Read, AllocatesNothingInSteadyState) {
  Engine engine(model_, 3, 2);
  const std::vector<Prompts> calls = {prompts({40, 3, 70}), prompts({40, 40, 40})};
  const auto read = [&] {
    for (const Prompts& call : calls) {
      engine.reset();
      engine.read(spans_of(call));
    }
  };
  read();
  read();
  const int64_t before = engine.context().scratch.allocations();
  for (int i = 0; i < 5; ++i) read();
  EXPECT_EQ(engine.context().scratch.allocations(), before);
}

}  // namespace
}  // namespace mamba3::testing
