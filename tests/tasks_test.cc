#include "train/tasks.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "support/errors.h"
#include "train/batch.h"

namespace mamba3 {
namespace {

using testing::input_error_of;

struct Sequence {
  std::vector<int32_t> tokens, targets;
};

Sequence sequence_of(const Task& task, int64_t length, uint32_t row,
                     Supervision supervision = Supervision::every_position) {
  // What a task does not fill would show as an id out of range.
  Sequence s{std::vector(static_cast<size_t>(length), -7),
             std::vector(static_cast<size_t>(length), -7)};
  Random random(5, static_cast<uint64_t>(length), row);
  task.generate(random, supervision, s.tokens, s.targets);
  return s;
}

Sequence answers_of(const Task& task, int64_t length, uint32_t row) {
  return sequence_of(task, length, row, Supervision::final_answer);
}

int64_t asked(const Sequence& s) {
  return std::count_if(s.targets.begin(), s.targets.end(), [](int32_t t) { return t >= 0; });
}

std::vector<int64_t> some_lengths(const Task& task) {
  std::vector<int64_t> lengths;
  for (int64_t n = task.min_length(); n < task.min_length() + 40; ++n) lengths.push_back(n);
  for (const int64_t n : {160, 255, 256}) lengths.push_back(n);
  return lengths;
}

// The value modulo 5 by recursive descent: sums of products of factors, as they are written.
class Descent {
 public:
  explicit Descent(std::string_view text) : text_(text) {}

  int value() {
    const int result = sum();
    EXPECT_TRUE(text_.empty()) << "not read: " << text_;
    return result;
  }

 private:
  bool take(char c) {
    if (!text_.starts_with(c)) return false;
    text_.remove_prefix(1);
    return true;
  }
  int sum() {
    int result = product();
    while (true) {
      if (take('+')) {
        result = modulo(result + product());
      } else if (take('-')) {
        result = modulo(result - product());
      } else {
        return result;
      }
    }
  }
  int product() {
    int result = factor();
    while (take('*')) result = modulo(result * factor());
    return result;
  }
  int factor() {
    if (take('-')) return modulo(-factor());
    if (take('(')) {
      const int result = sum();
      EXPECT_TRUE(take(')')) << text_;
      return result;
    }
    for (int digit = 0; digit < 5; ++digit) {
      if (take(static_cast<char>('0' + digit))) return digit;
    }
    ADD_FAILURE() << "no operand: " << text_;
    return 0;
  }
  static int modulo(int value) { return ((value % 5) + 5) % 5; }

  std::string_view text_;
};

int value_of(std::string_view expression) {
  return Descent(expression).value();
}

std::string text_of(const std::vector<int32_t>& tokens) {
  std::string text;
  for (const int32_t token : tokens) text += "01234+-*=_()"[token];
  return text;
}

TEST(Tasks, TheEvaluatorOfTheTestsIsRight) {
  EXPECT_EQ(value_of("2-3-3*2"), 3);  // the example of the papers
  EXPECT_EQ(value_of("2*3+4*4"), 2);
  EXPECT_EQ(value_of("-4"), 1);
  EXPECT_EQ(value_of("((1-(-2))*((4)--3))"), 1);
}

TEST(Tasks, HaveTheirNamesAndIdsInRangeAtEveryLength) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    EXPECT_EQ(task->name(), name);
    for (const int64_t length : some_lengths(*task)) {
      SCOPED_TRACE(fmt::format("{} {}", name, length));
      for (uint32_t row = 0; row < 20; ++row) {
        const Sequence s = sequence_of(*task, length, row);
        for (const int32_t token : s.tokens) {
          ASSERT_GE(token, 0);
          ASSERT_LT(token, task->vocab());
        }
        for (const int32_t target : s.targets) {
          ASSERT_GE(target, -1);
          ASSERT_LT(target, task->vocab());
        }
      }
    }
  }
}

TEST(Tasks, EveryIdOfTheVocabularyOccurs) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    std::set<int32_t> ids;
    for (uint32_t row = 0; row < 400; ++row) {
      for (const int64_t length : {15, 64}) {
        for (const int32_t token : sequence_of(*task, length, row).tokens) ids.insert(token);
      }
    }
    const std::string_view missing = name == "modular_arithmetic_brackets" ? "*_" : "";
    EXPECT_EQ(std::ssize(ids), task->vocab() - std::ssize(missing)) << name;
  }
}

TEST(Tasks, AreAPureFunctionOfTheRandomNumbers) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    const Sequence one = sequence_of(*task, 64, 1), again = sequence_of(*task, 64, 1);
    EXPECT_EQ(one.tokens, again.tokens) << name;
    EXPECT_EQ(one.targets, again.targets) << name;
    EXPECT_NE(one.tokens, sequence_of(*task, 64, 2).tokens) << name;
  }
}

TEST(Tasks, FinalAnswersAreAPartOfTheOthers) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    const bool one_answer = name != "associative_recall" && name != "needle";
    for (const int64_t length : some_lengths(*task)) {
      const Sequence every = sequence_of(*task, length, 3), last = answers_of(*task, length, 3);
      EXPECT_EQ(every.tokens, last.tokens);
      EXPECT_GE(asked(last), 1) << name;
      if (one_answer) {
        EXPECT_EQ(asked(last), 1) << name;
        EXPECT_GE(last.targets.back(), 0) << name;
      }
      for (size_t t = 0; t < last.targets.size(); ++t) {
        if (last.targets[t] >= 0) {
          EXPECT_EQ(every.targets[t], last.targets[t]) << name;
        }
      }
    }
  }
}

// Whoever guesses among the answers that occur is right as often as chance() says.
TEST(Tasks, ChanceIsWhatAGuesserReaches) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    std::vector<int32_t> answers;
    for (uint32_t row = 0; row < 2000; ++row) {
      for (const int32_t target : answers_of(*task, 24, row).targets) {
        if (target >= 0) answers.push_back(target);
      }
    }
    const std::set<int32_t> distinct(answers.begin(), answers.end());
    const std::vector<int32_t> choices(distinct.begin(), distinct.end());
    Random random(77);
    int64_t right = 0;
    for (const int32_t answer : answers) {
      right += choices[static_cast<size_t>(random.below(std::ssize(choices)))] == answer;
    }
    const double n = static_cast<double>(answers.size()), p = task->chance();
    EXPECT_NEAR(static_cast<double>(right) / n, p, 5 * std::sqrt(p * (1 - p) / n)) << name;
    EXPECT_EQ(std::lround(1 / p), std::ssize(choices)) << name;
  }
}

// Five classes, none rare and none so frequent that saying always the same would look like skill.
TEST(ModularArithmetic, AnswersAreSpread) {
  for (const char* name : {"modular_arithmetic", "modular_arithmetic_brackets"}) {
    const auto task = make_task(name);
    for (const int64_t length : {2, 3, 4, 6, 7, 8, 13, 40, 160, 256}) {
      std::map<int32_t, int> counts;
      for (uint32_t row = 0; row < 2000; ++row) {
        ++counts[answers_of(*task, length, row).targets.back()];
      }
      ASSERT_EQ(counts.size(), 5u);
      for (const auto& [answer, count] : counts) {
        EXPECT_LT(count, 700) << name << " " << length << ": " << answer;
        EXPECT_GT(count, 240) << name << " " << length << ": " << answer;
      }
    }
  }
}

TEST(ModularArithmetic, AsksForTheValueOfWhatWasRead) {
  const auto task = make_task("modular_arithmetic");
  EXPECT_EQ(task->vocab(), 10);
  for (const int64_t length : some_lengths(*task)) {
    for (uint32_t row = 0; row < 20; ++row) {
      const Sequence s = sequence_of(*task, length, row);
      const std::string text = text_of(s.tokens);
      SCOPED_TRACE(text);
      const size_t begin = static_cast<size_t>(length % 2);  // a digit and an = have even places
      EXPECT_EQ(text.substr(0, begin), std::string(begin, '_'));
      EXPECT_EQ(text.find_first_of("_()", begin), std::string::npos);
      for (size_t t = 0; t < begin; ++t) EXPECT_EQ(s.targets[t], -1);
      for (size_t t = begin; t + 1 < text.size(); ++t) {
        const bool digit = (t - begin) % 2 == 0;
        EXPECT_EQ(std::isdigit(text[t]) != 0, digit);
        EXPECT_EQ(s.targets[t], digit ? value_of(text.substr(begin, t + 1 - begin)) : -1);
      }
      EXPECT_EQ(text.find('='), text.size() - 1);
      EXPECT_EQ(s.targets.back(), s.targets[text.size() - 2]);
    }
  }
}

TEST(ModularArithmetic, BracketsAreWellFormedAndTheirValueIsRight) {
  const auto task = make_task("modular_arithmetic_brackets");
  EXPECT_EQ(task->vocab(), 12);
  size_t deepest = 0;
  std::set<size_t> ends;  // of the outermost operands in expressions of 10 tokens
  for (const int64_t length : some_lengths(*task)) {
    for (uint32_t row = 0; row < 40; ++row) {
      const Sequence s = sequence_of(*task, length, row);
      const std::string text = text_of(s.tokens);
      SCOPED_TRACE(text);
      EXPECT_EQ(text.find('='), text.size() - 1);
      EXPECT_EQ(text.find('*'), std::string::npos);
      EXPECT_EQ(s.targets.back(), value_of(text.substr(0, text.size() - 1)));
      size_t open = 0;
      for (size_t t = 0; t + 1 < text.size(); ++t) {
        if (text[t] == '(') ++open;
        if (text[t] == ')') {
          ASSERT_GT(open, 0u);
          --open;
        }
        const bool operand = text[t] == ')' || std::isdigit(text[t]) != 0;
        const std::string closed = text.substr(0, t + 1) + std::string(open, ')');
        EXPECT_EQ(s.targets[t], operand ? value_of(closed) : -1);
        deepest = std::max(deepest, open);
        if (length == 11 && operand && open == 1) ends.insert(t);
      }
      EXPECT_EQ(open, 0u);
    }
  }
  EXPECT_GE(deepest, 8u);
  EXPECT_EQ(ends.size(), 7u);  // 1 to 6 tokens to the left, and the end of the right side
}

TEST(ModularArithmetic, ShortExpressionsInBrackets) {
  const auto task = make_task("modular_arithmetic_brackets");
  const auto shape = [&](int64_t length) {
    std::string text = text_of(sequence_of(*task, length, 0).tokens);
    for (char& c : text) c = std::isdigit(c) != 0 ? 'd' : c;
    return text;
  };
  EXPECT_EQ(shape(2), "d=");
  EXPECT_EQ(shape(3), "-d=");
  EXPECT_EQ(shape(4), "(d)=");
  EXPECT_EQ(shape(5), "(-d)=");
}

TEST(AssociativeRecall, AsksEveryKeyOnceForItsValue) {
  constexpr int32_t kSymbols = 20, kFiller = 40;
  const auto task = make_task("associative_recall", {.symbols = kSymbols, .pairs = 8});
  EXPECT_EQ(task->vocab(), 41);
  for (const int64_t length : some_lengths(*task)) {
    const size_t pairs = static_cast<size_t>(std::min<int64_t>(8, length / 3));
    for (uint32_t row = 0; row < 20; ++row) {
      SCOPED_TRACE(fmt::format("{} {}", length, row));
      const Sequence s = answers_of(*task, length, row);
      std::map<int32_t, int32_t> values;
      for (size_t i = 0; i < pairs; ++i) {
        EXPECT_LT(s.tokens[2 * i], kSymbols);
        EXPECT_GE(s.tokens[2 * i + 1], kSymbols);
        EXPECT_LT(s.tokens[2 * i + 1], kFiller);
        EXPECT_EQ(s.targets[2 * i], -1);
        EXPECT_EQ(s.targets[2 * i + 1], -1);
        values[s.tokens[2 * i]] = s.tokens[2 * i + 1];
      }
      EXPECT_EQ(values.size(), pairs);  // the keys are different
      for (size_t t = 2 * pairs; t < s.tokens.size(); ++t) {
        if (s.tokens[t] == kFiller) {
          EXPECT_EQ(s.targets[t], -1);
          continue;
        }
        ASSERT_TRUE(values.contains(s.tokens[t]));
        EXPECT_EQ(s.targets[t], values[s.tokens[t]]);
        values.erase(s.tokens[t]);
      }
      EXPECT_TRUE(values.empty());  // and each was asked
    }
  }
}

TEST(AssociativeRecall, QueriesAreAnywhereAfterThePairsInAnyOrder) {
  const auto task = make_task("associative_recall", {.symbols = 16, .pairs = 2});
  std::map<size_t, int> places;
  int in_order = 0;
  for (uint32_t row = 0; row < 2000; ++row) {
    const Sequence s = answers_of(*task, 14, row);
    bool first = true;
    for (size_t t = 4; t < 14; ++t) {
      if (s.targets[t] < 0) continue;
      ++places[t];
      in_order += first && s.tokens[t] == s.tokens[0];
      first = false;
    }
  }
  EXPECT_EQ(places.size(), 10u);
  for (const auto& [place, count] : places) EXPECT_NEAR(count, 400, 90) << place;  // 5 sigma
  EXPECT_NEAR(in_order, 1000, 112);
}

TEST(AssociativeRecall, TakesAsManyPairsAsFit) {
  const auto task = make_task("associative_recall");
  EXPECT_EQ(asked(answers_of(*task, 3, 0)), 1);
  EXPECT_EQ(asked(answers_of(*task, 100, 0)), 33);
  EXPECT_EQ(asked(answers_of(*task, 256, 0)), 64);
  EXPECT_EQ(asked(answers_of(*task, 1000, 0)), 64);
}

TEST(Needle, IsCopiedFromAnyDepth) {
  constexpr int32_t kMark = 30;
  const auto task = make_task("needle", {.symbols = 30, .copied = 3});
  EXPECT_EQ(task->vocab(), 31);
  EXPECT_EQ(task->min_length(), 9);
  for (const int64_t length : {9, 10, 18}) {
    std::map<int64_t, int> depths;
    for (uint32_t row = 0; row < 2000; ++row) {
      const Sequence s = answers_of(*task, length, row);
      ASSERT_EQ(std::count(s.tokens.begin(), s.tokens.end(), kMark), 2);
      const auto mark = std::find(s.tokens.begin(), s.tokens.end(), kMark);
      ++depths[mark - s.tokens.begin()];
      // mark, key, a, b, c ... mark, key, a, b with the answers a, b, c at the last three places
      EXPECT_TRUE(std::equal(mark, mark + 4, s.tokens.end() - 4));
      EXPECT_TRUE(std::equal(mark + 2, mark + 5, s.targets.end() - 3));
      EXPECT_EQ(asked(s), 3);
    }
    const int64_t places = length - 8;
    EXPECT_EQ(std::ssize(depths), places);
    const double expected = 2000.0 / static_cast<double>(places);
    for (const auto& [depth, count] : depths) {
      EXPECT_NEAR(count, expected, 5 * std::sqrt(expected)) << length << " " << depth;
    }
  }
}

TEST(Tasks, FillTheRowsOfABatchUnderBothSupervisions) {
  for (const std::string& name : task_names()) {
    const auto task = make_task(name);
    TaskSource::Options options{.length = {.first = task->min_length(), .last = 48, .growth = 0.5},
                                .supervision = Supervision::final_answer,
                                .validation_length = 64,
                                .validation_rows = 4};
    const TaskSource source(*task, options);
    Batch batch;
    source.train(0, 1, 0, 50, batch);
    std::set<size_t> ends;
    for (int64_t b = 0; b < batch.B; ++b) {
      const auto targets = batch.row_targets(b);
      const auto last =
          std::find_if(targets.rbegin(), targets.rend(), [](int t) { return t >= 0; });
      ASSERT_NE(last, targets.rend()) << name;
      ends.insert(static_cast<size_t>(targets.rend() - last));
    }
    EXPECT_GT(ends.size(), 10u) << name;  // rows have lengths of their own
    source.validate(0, 4, batch);
    const int64_t answers = name == "associative_recall" ? 21 : name == "needle" ? 4 : 1;
    EXPECT_EQ(batch.scored(), 4 * answers) << name;
    options.length.first = task->min_length() - 1;
    EXPECT_THROW(TaskSource(*task, options), InputError) << name;
  }
}

TEST(Tasks, AnUpdateDrawsItsLengthFromTheShortestUp) {
  const auto task = make_task("parity");
  TaskSource::Options options{.length = {.first = 20, .last = 40, .growth = 0.5}, .shortest = 5};
  const auto lengths = [&](double progress) {
    const TaskSource source(*task, options);
    std::set<int64_t> seen;
    Batch batch, other_rows;
    for (int64_t step = 0; step < 400; ++step) {
      source.train(step, progress, 0, 2, batch);
      source.train(step, progress, 2, 2, other_rows);  // of the same update
      EXPECT_EQ(batch.T, other_rows.T);
      EXPECT_EQ(batch.scored(), 2 * batch.T);
      seen.insert(batch.T);
    }
    return std::tuple(*seen.begin(), *seen.rbegin(), std::ssize(seen));
  };
  EXPECT_EQ(lengths(0), std::tuple(5, 20, 16));
  EXPECT_EQ(lengths(1), std::tuple(5, 40, 36));
  options.shortest = 21;
  EXPECT_EQ(input_error_of([&] { TaskSource(*task, options); }),
            "the shortest sequence of parity must have from 1 to 20 tokens, got 21");
}

TEST(Tasks, RefuseMeasuresThatCannotBe) {
  const auto problem = [](const char* name, const TaskOptions& options) {
    return input_error_of([&] { make_task(name, options); });
  };
  EXPECT_EQ(problem("associative_recall", {.symbols = 1, .pairs = 1}),
            "associative_recall needs at least 2 symbols to choose from, got 1");
  EXPECT_EQ(
      problem("associative_recall", {.symbols = 8, .pairs = 9}),
      "the pairs of associative_recall have different keys: there must be from 1 to 8, got 9");
  EXPECT_EQ(
      problem("associative_recall", {.symbols = 8, .pairs = 0}),
      "the pairs of associative_recall have different keys: there must be from 1 to 8, got 0");
  EXPECT_EQ(problem("needle", {.symbols = 1}),
            "needle needs at least 2 symbols to choose from, got 1");
  EXPECT_EQ(problem("needle", {.copied = 0}), "needle copies at least 1 token, got 0");
  EXPECT_EQ(problem("party", {}),
            "unknown task 'party': use parity, modular_arithmetic, modular_arithmetic_brackets, "
            "associative_recall, needle");
}

}  // namespace
}  // namespace mamba3
