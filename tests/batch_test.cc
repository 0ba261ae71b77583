#include "train/batch.h"

#include <gtest/gtest.h>

#include <numeric>
#include <set>

#include "core/error.h"

namespace mamba3 {
namespace {

std::vector<int32_t> counting(int64_t n) {
  std::vector<int32_t> stream(static_cast<size_t>(n));
  std::iota(stream.begin(), stream.end(), 0);
  return stream;
}

TEST(TextSource, WindowsAreContiguousAndTargetsAreTheNextToken) {
  const std::vector<int32_t> stream = counting(100);
  const TextSource source(stream, {}, {.T = 7, .seed = 3});
  std::set<int32_t> begins;
  Batch batch;
  for (int64_t step = 0; step < 200; ++step) {
    source.train(step, 0, 0, 4, batch);
    ASSERT_EQ(batch.tokens.size(), 28u);
    ASSERT_EQ(batch.scored(), 28);
    for (int64_t b = 0; b < 4; ++b) {
      for (size_t t = 0; t < 7; ++t) {
        EXPECT_EQ(batch.row_tokens(b)[t], batch.row_tokens(b)[0] + static_cast<int32_t>(t));
        EXPECT_EQ(batch.row_targets(b)[t], batch.row_tokens(b)[t] + 1);
      }
      begins.insert(batch.row_tokens(b)[0]);
    }
  }
  // Every window that fits occurs: the first begins at 0, the last ends with the last token.
  EXPECT_EQ(begins.size(), 93u);
  EXPECT_EQ(*begins.rbegin(), 92);
}

TEST(TextSource, ABatchDependsOnlyOnItsPlace) {
  const std::vector<int32_t> stream = counting(1000);
  const TextSource source(stream, {}, {.T = 5, .seed = 3});
  const TextSource other(stream, {}, {.T = 5, .seed = 4});
  Batch whole, half, different;
  source.train(9, 0, 0, 8, whole);
  source.train(10, 0, 0, 8, half);
  EXPECT_NE(whole.tokens, half.tokens);
  source.train(9, 0, 4, 4, half);  // the second micro batch of the same update
  EXPECT_EQ(std::vector(whole.tokens.begin() + 20, whole.tokens.end()), half.tokens);
  other.train(9, 0, 0, 8, different);
  EXPECT_NE(whole.tokens, different.tokens);
}

TEST(TextSource, ValidationWalksTheHeldOutText) {
  const std::vector<int32_t> train = counting(50), held_out = counting(36);
  const TextSource source(train, held_out, {.T = 10});
  EXPECT_EQ(source.validation_length(), 10);
  ASSERT_EQ(source.validation_rows(), 3);
  Batch batch;
  source.validate(1, 2, batch);
  EXPECT_EQ(batch.row_tokens(0)[0], 10);
  EXPECT_EQ(batch.row_tokens(1)[9], 29);
  EXPECT_EQ(batch.row_targets(1)[9], 30);
  EXPECT_EQ(TextSource(train, held_out, {.T = 10, .validation_tokens = 25}).validation_rows(), 2);
}

TEST(TextSource, ShortHeldOutTextShortensTheWindow) {
  const std::vector<int32_t> train = counting(50), held_out = counting(5);
  const TextSource source(train, held_out, {.T = 10});
  EXPECT_EQ(source.validation_length(), 4);
  EXPECT_EQ(source.validation_rows(), 1);
  EXPECT_EQ(TextSource(train, std::span(held_out).first(1), {.T = 10}).validation_rows(), 0);
}

TEST(TextSource, RefusesATextShorterThanTheContext) {
  const std::vector<int32_t> stream = counting(11);
  EXPECT_NO_THROW(TextSource(stream, {}, {.T = 10}));
  EXPECT_THROW(TextSource(stream, {}, {.T = 11}), InputError);
  EXPECT_THROW(TextSource({}, {}, {.T = 1}), InputError);
}

TEST(Curriculum, GrowsByTheSameFactorAndStays) {
  const Curriculum lengths{.first = 4, .last = 24, .growth = 0.5};
  EXPECT_EQ(lengths.at(0), 4);
  EXPECT_EQ(lengths.at(0.25), 10);  // 4 sqrt(6)
  EXPECT_EQ(lengths.at(0.5), 24);
  EXPECT_EQ(lengths.at(1), 24);
  EXPECT_EQ((Curriculum{.first = 4, .last = 24}).at(0), 24);
}

TEST(TaskSource, ParityIsRightAtEveryPosition) {
  const auto task = make_task("parity");
  const TaskSource source(*task, {.length = {.first = 3, .last = 20, .growth = 1}});
  Batch batch;
  source.train(5, 1, 0, 16, batch);
  ASSERT_EQ(batch.T, 20);
  EXPECT_EQ(batch.scored(), 320);
  int ones = 0;
  for (int64_t b = 0; b < batch.B; ++b) {
    int sum = 0;
    for (size_t t = 0; t < 20; ++t) {
      sum += batch.row_tokens(b)[t];
      EXPECT_EQ(batch.row_targets(b)[t], sum % 2);
    }
    ones += sum;
  }
  EXPECT_NEAR(ones, 160, 45);  // five standard deviations
}

TEST(TaskSource, FinalAnswersHaveAllLengthsAndPadding) {
  const auto task = make_task("parity");
  const TaskSource source(
      *task, {.length = {.first = 6, .last = 6}, .supervision = Supervision::final_answer});
  std::set<int64_t> lengths;
  Batch batch;
  source.train(0, 0, 0, 200, batch);
  EXPECT_EQ(batch.scored(), 200);
  for (int64_t b = 0; b < batch.B; ++b) {
    const auto targets = batch.row_targets(b);
    const auto answer = std::find_if(targets.begin(), targets.end(), [](int t) { return t >= 0; });
    const auto length = answer - targets.begin() + 1;
    const auto tokens = batch.row_tokens(b);
    EXPECT_EQ(*answer, std::accumulate(tokens.begin(), tokens.begin() + length, 0) % 2);
    EXPECT_EQ(std::count(tokens.begin() + length, tokens.end(), 0), 6 - length);
    lengths.insert(length);
  }
  EXPECT_EQ(lengths, (std::set<int64_t>{1, 2, 3, 4, 5, 6}));
}

TEST(TaskSource, ValidationIsTheSameForEverySeedAndApartFromTraining) {
  const auto task = make_task("parity");
  TaskSource::Options options{.length = {.first = 64, .last = 64},
                              .seed = 1,
                              .validation_length = 64,
                              .validation_rows = 8};
  const TaskSource one(*task, options);
  options.seed = 2;
  const TaskSource two(*task, options);
  Batch a, b, train;
  one.validate(0, 8, a);
  two.validate(0, 8, b);
  EXPECT_EQ(a.tokens, b.tokens);
  EXPECT_EQ(a.scored(), 8);
  for (int64_t row = 0; row < 8; ++row) EXPECT_GE(a.row_targets(row).back(), 0);
  one.train(64, 1, 0, 8, train);
  EXPECT_NE(a.tokens, train.tokens);
  two.train(64, 1, 0, 8, b);
  EXPECT_NE(train.tokens, b.tokens);
}

TEST(TaskSource, RefusesImpossibleLengths) {
  const auto task = make_task("parity");
  EXPECT_THROW(TaskSource(*task, {.length = {.first = 0, .last = 4}}), InputError);
  EXPECT_THROW(TaskSource(*task, {.length = {.first = 5, .last = 4}}), InputError);
  EXPECT_THROW(TaskSource(*task, {.length = {.first = 4, .last = 4, .growth = 2}}), InputError);
  EXPECT_THROW(TaskSource(*task, {.length = {.first = 4, .last = 4}, .validation_rows = 1}),
               InputError);
  EXPECT_THROW(make_task("party"), InputError);
}

TEST(Task, ScaledAccuracy) {
  const auto task = make_task("parity");
  EXPECT_DOUBLE_EQ(scaled_accuracy(*task, 1), 1);
  EXPECT_DOUBLE_EQ(scaled_accuracy(*task, 0.5), 0);
}

}  // namespace
}  // namespace mamba3
