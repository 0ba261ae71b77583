#include "ops/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ref/sample.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The filters and numbers of args, on these logits.
std::vector<int32_t> sample_rows(Context& ctx, SampleArgs args, const Tensor& logits) {
  const Tensor out({logits.view().dim(0)}, DType::i32);
  args.logits = logits;
  if (args.vocab == 0) args.vocab = logits.view().dim(1);
  args.out = out;
  sample(ctx, args);
  return {out.host().as<int32_t>(), out.host().as<int32_t>() + out.view().size()};
}

// One row, drawn `draws` times: the rows of a batch have draws of their own.
Tensor repeated(const std::vector<double>& logits, int64_t draws) {
  std::vector<double> rows;
  for (int64_t i = 0; i < draws; ++i) rows.insert(rows.end(), logits.begin(), logits.end());
  return Tensor::of({draws, static_cast<int64_t>(logits.size())}, rows);
}

std::vector<double> normal_logits(Random& random, int64_t n, double deviation) {
  return Tensor::normal(random, {n}, deviation).values();
}

// Pearson's statistic of draws against probabilities; ids that must not be drawn must not be.
void expect_distribution(const std::vector<int32_t>& draws, const std::vector<double>& p) {
  std::vector<double> counts(p.size(), 0.0);
  for (const int32_t id : draws) ++counts[static_cast<size_t>(id)];
  double statistic = 0, freedom = -1;
  for (size_t i = 0; i < p.size(); ++i) {
    const double expected = p[i] * static_cast<double>(draws.size());
    if (p[i] == 0) {
      EXPECT_EQ(counts[i], 0) << "id " << i << " is filtered out";
      continue;
    }
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++freedom;
  }
  // Mean `freedom`, variance twice that; four deviations.
  EXPECT_LT(statistic, freedom + 4 * std::sqrt(2 * freedom) + 1e-9);
  EXPECT_GE(statistic, freedom - 4 * std::sqrt(2 * freedom) - 1e-9) << "too even to be random";
}

void expect_reference_distribution(const SampleArgs& args, const std::vector<double>& logits,
                                   std::span<const int32_t> history = {}) {
  Context ctx = make_context(2);
  constexpr int64_t kDraws = 20000;
  SampleArgs with_history = args;
  std::vector<double> rows;
  for (int64_t i = 0; i < kDraws; ++i) rows.insert(rows.end(), history.begin(), history.end());
  const Tensor ids = Tensor::of({kDraws, static_cast<int64_t>(history.size())}, rows, DType::i32);
  if (!history.empty()) with_history.history = ids;
  const auto draws = sample_rows(ctx, with_history, repeated(logits, kDraws));
  expect_distribution(draws, ref::sample_probabilities(args, logits, history));
}

TEST(Sample, DrawsFromTheDistributionAtEveryTemperature) {
  Random random(1);
  const auto logits = normal_logits(random, 12, 1);
  for (const float temperature : {0.3f, 1.0f, 2.5f}) {
    expect_reference_distribution({.temperature = temperature, .seed = 7}, logits);
  }
}

TEST(Sample, DrawsFromWhatEachFilterKeeps) {
  Random random(2);
  const auto logits = normal_logits(random, 15, 1.5);
  expect_reference_distribution({.top_k = 4, .seed = 1}, logits);
  expect_reference_distribution({.top_p = 0.7f, .seed = 2}, logits);
  expect_reference_distribution({.min_p = 0.2f, .seed = 3}, logits);
  const std::vector<int32_t> history = {3, -1, 5, 3, 3, 0};
  expect_reference_distribution({.repeat_penalty = 1.7f, .seed = 4}, logits, history);
  expect_reference_distribution({.temperature = 0.7f,
                                 .top_k = 9,
                                 .top_p = 0.9f,
                                 .min_p = 0.05f,
                                 .repeat_penalty = 1.3f,
                                 .seed = 5},
                                logits, history);
}

// With thousands of tokens the selections take their long ways. At a high temperature the draws are
// nearly uniform over what was kept, so their mean rank tells how many that were.
TEST(Sample, FiltersKeepTheRightTokensOfALargeVocabulary) {
  for_each_instruction_set([] {
    Random random(3);
    Context ctx = make_context(2);
    const auto logits = normal_logits(random, 5003, 1);
    const Tensor rows = repeated(logits, 150);
    const auto rank = [&](int32_t id) {
      const double logit = logits[static_cast<size_t>(id)];
      return static_cast<double>(
          std::count_if(logits.begin(), logits.end(), [&](double other) { return other > logit; }));
    };
    for (const SampleArgs& args :
         {SampleArgs{.temperature = 50, .top_k = 40}, SampleArgs{.temperature = 50, .top_k = 3000},
          SampleArgs{.temperature = 50, .top_p = 0.1f},
          SampleArgs{.temperature = 50, .top_p = 0.95f},
          SampleArgs{.temperature = 50, .min_p = 0.3f},
          SampleArgs{.temperature = 50, .top_k = 500, .top_p = 0.5f}}) {
      const auto p = ref::sample_probabilities(args, logits, {});
      const auto kept = static_cast<double>(
          std::count_if(p.begin(), p.end(), [](double value) { return value > 0; }));
      double mean_rank = 0;
      for (const int32_t id : sample_rows(ctx, args, rows)) {
        EXPECT_GT(p[static_cast<size_t>(id)], 0)
            << "top_k " << args.top_k << " top_p " << args.top_p;
        mean_rank += rank(id) / 150;
      }
      EXPECT_NEAR(mean_rank, (kept - 1) / 2, 0.1 * kept)  // four deviations
          << "top_k " << args.top_k << " top_p " << args.top_p << " min_p " << args.min_p;
    }
  });
}

TEST(Sample, TemperatureZeroTakesTheLargestAndTheLowestIdOnATie) {
  for_each_instruction_set([] {
    Random random(4);
    Context ctx = make_context(1);
    for (const int64_t n : {1, 5, 16, 1023, 1500}) {
      auto logits = normal_logits(random, n, 1);
      const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      for (int64_t i = best + 1; i < n; i += 3)
        logits[static_cast<size_t>(i)] = logits[static_cast<size_t>(best)];
      EXPECT_EQ(sample_rows(ctx, {.temperature = 0}, repeated(logits, 1))[0], best);
      EXPECT_EQ(sample_rows(ctx, {.top_k = 1, .seed = 9}, repeated(logits, 1))[0], best);
      EXPECT_EQ(sample_rows(ctx, {.top_p = 1e-6f}, repeated(logits, 1))[0], best);
      EXPECT_EQ(sample_rows(ctx, {.temperature = 1e-38f}, repeated({0, 1, 0.5}, 1))[0], 1);
    }
  });
}

TEST(Sample, TheLowerIdsOfATieAreKept) {
  Context ctx = make_context(1);
  const std::vector<double> logits = {1, 2, 1, 3, 1, 1};
  for (const SampleArgs& args : {SampleArgs{.top_k = 4}, SampleArgs{.top_p = 0.85f}}) {
    const auto p = ref::sample_probabilities(args, logits, {});
    EXPECT_GT(p[2], 0);
    EXPECT_EQ(p[4], 0);
    expect_reference_distribution(args, logits);
  }
}

TEST(Sample, PenaltyAppliesOnceAndToGreedyToo) {
  Context ctx = make_context(1);
  const Tensor logits = Tensor::of({2, 4}, std::vector<double>{3, 2.5, 1, 0, -1, -1.5, -3, -4});
  const Tensor history = Tensor::of({2, 3}, std::vector<double>{0, 0, 0, 0, -1, 0}, DType::i32);
  SampleArgs args{.history = history, .temperature = 0, .repeat_penalty = 1.1f};
  EXPECT_EQ(sample_rows(ctx, args, logits), (std::vector<int32_t>{0, 0}));  // 2.73, -1.1
  args.repeat_penalty = 1.25f;
  EXPECT_EQ(sample_rows(ctx, args, logits), (std::vector<int32_t>{1, 0}));  // 2.4, -1.25
  args.repeat_penalty = 2;
  EXPECT_EQ(sample_rows(ctx, args, logits), (std::vector<int32_t>{1, 1}));  // 1.5, -2
}

TEST(Sample, PaddingAndMinusInfinityAreNeverDrawn) {
  Context ctx = make_context(2);
  const Tensor logits = repeated({0, -kInfinity, 0, 9, 9}, 500);
  for (const int32_t id : sample_rows(ctx, {.vocab = 3, .temperature = 10}, logits))
    EXPECT_TRUE(id == 0 || id == 2);
  for (const int32_t id : sample_rows(ctx, {.vocab = 3, .top_k = 3, .top_p = 0.999f}, logits))
    EXPECT_TRUE(id == 0 || id == 2);
}

TEST(Sample, TheDrawIsAFunctionOfSeedPositionAndRow) {
  Random random(5);
  const Tensor logits = repeated(normal_logits(random, 1000, 1), 8);
  const auto draw = [&](int threads, uint64_t seed, uint64_t position) {
    Context ctx = make_context(threads);
    return sample_rows(ctx, {.seed = seed, .position = position}, logits);
  };
  const auto first = draw(1, 1, 10);
  EXPECT_EQ(draw(1, 1, 10), first);
  EXPECT_EQ(draw(3, 1, 10), first);
  EXPECT_NE(draw(1, 2, 10), first);
  EXPECT_NE(draw(1, 1, 11), first);
  EXPECT_NE(std::count(first.begin(), first.end(), first[0]), 8) << "rows draw alike";
  // A row's draw does not depend on the batch that it is in.
  Context ctx = make_context(1);
  const Tensor two = repeated(normal_logits(random, 1000, 1), 2);
  Tensor three = Tensor::normal(random, {3, 1000});
  for (int64_t i = 0; i < 2000; ++i) three.set(i, two.at(i));
  const auto a = sample_rows(ctx, {.seed = 4}, two), b = sample_rows(ctx, {.seed = 4}, three);
  EXPECT_EQ(a[0], b[0]);
  EXPECT_EQ(a[1], b[1]);
}

TEST(Sample, StepAddsToThePosition) {
  Random random(9);
  Context ctx = make_context(1);
  const Tensor logits = repeated(normal_logits(random, 1000, 1), 8);
  Tensor step({1}, DType::i64);
  step.set(0, 5);
  const auto want = sample_rows(ctx, {.seed = 1, .position = 15}, logits);
  EXPECT_EQ(sample_rows(ctx, {.seed = 1, .position = 10, .step = step}, logits), want);
}

// A sequence draws the same wherever in a batch it is, and each from its own position.
TEST(Sample, RowsAndPositionsCanBeNamed) {
  Random random(9);
  Context ctx = make_context(1);
  const Tensor four = repeated(normal_logits(random, 1000, 1), 4);
  const auto at_10 = sample_rows(ctx, {.seed = 1, .position = 10}, four);
  const auto at_17 = sample_rows(ctx, {.seed = 1, .position = 17}, four);
  const Tensor step = Tensor::of({4}, std::vector<double>{0, 7, 0, 7}, DType::i64);
  EXPECT_EQ(sample_rows(ctx,
                        {.seed = 1,
                         .position = 10,
                         .step = step,
                         .rows = Tensor::of_ids({2, 1, 0, 0}),
                         .first_row = 1},
                        four),
            (std::vector<int32_t>{at_10[3], at_17[2], at_10[1], at_17[1]}));
}

// Their sums are rounded differently, so a draw may differ where two tokens meet: once in a
// million.
TEST(Sample, TheGpuDrawsTheTokensOfTheCpu) {
  if (test_device() == Device::cpu) GTEST_SKIP() << "for the GPU";
  Context gpu = make_context(1), cpu(1);
  for (const int64_t V : {1, 37, 5003, 40001, 128256}) {
    Random random(10);
    const Tensor logits = Tensor::normal(random, {6, V}, 3);
    for (const SampleArgs& args :
         {SampleArgs{.seed = 1}, SampleArgs{.temperature = 0}, SampleArgs{.top_k = 40, .seed = 2},
          SampleArgs{.temperature = 5, .top_k = 2500, .seed = 3},
          SampleArgs{.temperature = 3, .top_p = 0.9f, .seed = 4},
          SampleArgs{.temperature = 3, .min_p = 0.01f, .seed = 5},
          SampleArgs{.temperature = 2, .top_k = 900, .top_p = 0.8f, .min_p = 1e-4f, .seed = 6}}) {
      std::vector<int32_t> want(6);
      SampleArgs on_cpu = args;
      on_cpu.logits = logits.host();
      on_cpu.vocab = V;
      on_cpu.out = view_of(want.data(), {6});
      sample(cpu, on_cpu);
      EXPECT_EQ(sample_rows(gpu, args, logits), want) << "V " << V << " seed " << args.seed;
    }
  }
}

// Where all logits are as good as one, a selection ends at the ids.
TEST(Sample, ThousandsOfTiesAreCutById) {
  Context ctx = make_context(2);
  std::vector<double> logits(5000, 1.0);
  logits[4000] = 1 + 1e-7;  // as f32 the next number
  logits[17] = -kInfinity;
  const Tensor rows = repeated(logits, 60);
  for (const SampleArgs& args :
       {SampleArgs{.top_k = 100, .seed = 1}, SampleArgs{.top_p = 0.0199f, .seed = 2}}) {
    const auto p = ref::sample_probabilities(args, logits, {});
    for (const int32_t id : sample_rows(ctx, args, rows)) {
      EXPECT_GT(p[static_cast<size_t>(id)], 0) << id;
      EXPECT_TRUE(id == 4000 || id < 101) << id;
    }
  }
}

TEST(Sample, EveryInstructionSetDrawsTheSame) {
  Random random(6);
  Context ctx = make_context(1);
  const Tensor logits = repeated(normal_logits(random, 3000, 2), 50);
  const SampleArgs args{
      .temperature = 0.8f, .top_k = 100, .top_p = 0.95f, .min_p = 0.01f, .seed = 3};
  const auto want = sample_rows(ctx, args, logits);
  for_each_instruction_set([&] { EXPECT_EQ(sample_rows(ctx, args, logits), want); });
}

TEST(Sample, LeavesTheLogitsAndReadsStridedRows) {
  Random random(7);
  Context ctx = make_context(2);
  const Tensor logits = Tensor::normal(random, {3, 40}, 1, DType::f32, 9);
  const Tensor dense = Tensor::of({3, 40}, logits.values());
  const SampleArgs args{.top_k = 5, .seed = 1};
  EXPECT_EQ(sample_rows(ctx, args, logits), sample_rows(ctx, args, dense));
  EXPECT_TRUE(same_bits(logits, dense));
}

TEST(SampleErrors, LogitsThatAreNotFinite) {
  Context ctx = make_context(2);
  for (const double bad : {std::nan(""), kInfinity}) {
    for (const SampleArgs& args :
         {SampleArgs{}, SampleArgs{.temperature = 0}, SampleArgs{.top_k = 2}}) {
      Tensor logits = Tensor::zeros({3, 37});
      logits.set(2 * 37 + 36, bad);
      if (test_device() == Device::cuda) {
        const auto ids = sample_rows(ctx, args, logits);
        EXPECT_GE(ids[1], 0);
        EXPECT_EQ(ids[2], -1);
        continue;
      }
      EXPECT_EQ(error_of([&] { sample_rows(ctx, args, logits); }),
                "[sample] logits of row 2 are not finite");
      logits.set(37, bad);
      EXPECT_EQ(error_of([&] { sample_rows(ctx, args, logits); }),
                "[sample] logits of row 1 are not finite");
    }
  }
  const Tensor nothing = repeated({-kInfinity, -kInfinity}, 1);
  if (test_device() == Device::cuda) {
    EXPECT_EQ(sample_rows(ctx, {}, nothing)[0], -1);
  } else {
    EXPECT_EQ(error_of([&] { sample_rows(ctx, {}, nothing); }),
              "[sample] logits of row 0 are not finite");
  }
}

TEST(SampleErrors, NameTheArgument) {
  Context ctx = make_context(1);
  const Tensor logits = Tensor::zeros({2, 5}), out({2}, DType::i32), out3({3}, DType::i32);
  const Tensor history = Tensor::of({2, 1}, std::vector<double>{4, -1}, DType::i32);
  const Tensor outside = Tensor::of({2, 1}, std::vector<double>{0, 5}, DType::i32);
  const SampleArgs good{.logits = logits, .vocab = 5, .history = history, .out = out};
  const auto message = [&](const auto& change) {
    SampleArgs args = good;
    change(args);
    return input_error_of([&] { sample(ctx, args); });
  };
  EXPECT_EQ(message([](SampleArgs&) {}), "nothing thrown");
  EXPECT_EQ(message([](SampleArgs& a) { a.logits = {}; }), "[sample] logits is missing");
  EXPECT_EQ(message([](SampleArgs& a) { a.vocab = 6; }), "[sample] vocab must be between 1 and V");
  EXPECT_EQ(message([](SampleArgs& a) { a.vocab = 0; }), "[sample] vocab must be between 1 and V");
  EXPECT_EQ(message([&](SampleArgs& a) { a.out = out3; }), "[sample] dim 0 of out: got 3, want 2");
  EXPECT_EQ(message([&](SampleArgs& a) { a.history = out3; }),
            "[sample] rank of history: got 1, want 2");
  if (test_device() == Device::cpu) {
    EXPECT_EQ(message([&](SampleArgs& a) { a.history = outside; }),
              "[sample] history[1] is 5, want -1 <= value < 5");
  }
  EXPECT_EQ(message([&](SampleArgs& a) { a.step = out; }),
            "[sample] dtype of step: got i32, want i64");
  EXPECT_EQ(message([&](SampleArgs& a) { a.rows = out3; }),
            "[sample] dim 0 of rows: got 3, want 2");
  const float nan = std::nanf("");
  for (const float bad : {-0.1f, nan}) {
    EXPECT_EQ(message([&](SampleArgs& a) { a.temperature = bad; }),
              "[sample] temperature must be finite and not negative (0: the largest logit)");
    EXPECT_EQ(message([&](SampleArgs& a) { a.top_p = bad; }),
              "[sample] top_p must be in (0, 1] (1: off)");
    EXPECT_EQ(message([&](SampleArgs& a) { a.min_p = bad; }),
              "[sample] min_p must be in [0, 1] (0: off)");
    EXPECT_EQ(message([&](SampleArgs& a) { a.repeat_penalty = bad; }),
              "[sample] repeat_penalty must be finite and positive (1: off)");
  }
  EXPECT_EQ(message([](SampleArgs& a) { a.top_p = 0; }),
            "[sample] top_p must be in (0, 1] (1: off)");
  EXPECT_EQ(message([](SampleArgs& a) { a.min_p = 1.5f; }),
            "[sample] min_p must be in [0, 1] (0: off)");
  EXPECT_EQ(message([](SampleArgs& a) { a.top_k = -1; }),
            "[sample] top_k must not be negative (0: off)");
}

}  // namespace
}  // namespace mamba3::testing
