#include "train/tasks.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "core/error.h"

namespace mamba3 {

namespace {

// Random bits; the answer is whether the number of ones so far is odd. The smallest task that needs
// an eigenvalue -1 of the state transition (Grazzi et al. 2025): each one flips the state.
class Parity final : public Task {
 public:
  std::string_view name() const override { return "parity"; }
  int64_t vocab() const override { return 2; }
  int64_t min_length() const override { return 1; }
  double chance() const override { return 0.5; }

  void generate(Random& random, Supervision supervision, std::span<int32_t> tokens,
                std::span<int32_t> targets) const override {
    int32_t parity = 0;
    for (size_t t = 0; t < tokens.size(); ++t) {
      tokens[t] = static_cast<int32_t>(random.below(2));
      parity ^= tokens[t];
      const bool asked = supervision == Supervision::every_position || t + 1 == tokens.size();
      targets[t] = asked ? parity : -1;
    }
  }
};

// The tokens of arithmetic: digits are their own ids.
constexpr int32_t kModulus = 5;
constexpr int32_t kPlus = 5, kMinus = 6, kTimes = 7, kEquals = 8, kPadding = 9;
constexpr int32_t kOpen = 10, kClose = 11;

int32_t random_digit(Random& random) {
  return static_cast<int32_t>(random.below(kModulus));
}

int32_t random_operator(Random& random) {
  return kPlus + static_cast<int32_t>(random.below(3));
}

// Reads an expression token by token and knows its value so far: that of what it has read, with the
// brackets that are still open closed. In each bracket that is a sum of terms, of which the last
// may yet be multiplied.
class Calculator {
 public:
  void read(int32_t token) {
    switch (token) {
      case kOpen:
        levels_.emplace_back();
        has_value_ = false;
        break;
      case kClose: {
        const int32_t inside = levels_.back().with(1);
        levels_.pop_back();
        operand(inside);
        break;
      }
      case kPlus:
      case kMinus:
        // A minus before an operand is a sign; behind one it begins the next term, as a plus does.
        if (has_value_) levels_.back() = {.sum = levels_.back().with(1), .term = 1};
        if (token == kMinus) levels_.back().term = (kModulus - levels_.back().term) % kModulus;
        has_value_ = false;
        break;
      case kTimes:
        has_value_ = false;
        break;
      default:
        operand(token);
    }
  }

  // Whether the last token completed an operand, so that there is a value.
  bool has_value() const { return has_value_; }
  int32_t value() const {
    return std::accumulate(levels_.rbegin(), levels_.rend(), 1,
                           [](int32_t inside, const Level& level) { return level.with(inside); });
  }

 private:
  struct Level {
    int32_t sum = 0, term = 1;  // the last term, and the sum of those before it

    // The value when the last term is multiplied by `factor`.
    int32_t with(int32_t factor) const { return (sum + term * factor) % kModulus; }
  };

  void operand(int32_t value) {
    levels_.back().term = levels_.back().term * value % kModulus;
    has_value_ = true;
  }

  std::vector<Level> levels_ = {{}};
  bool has_value_ = false;
};

// The value of an expression modulo 5, asked after its final `=` (Deletang et al. 2023; Grazzi et
// al. 2025). An expression is as long as it can be before the `=`, with padding in front of it
// where not every length is possible. With every position scored also the value of the expression
// read so far is asked, after each token that completes an operand, as if all brackets closed
// there.
class ModularArithmetic : public Task {
 public:
  int64_t min_length() const final { return 2; }
  double chance() const final { return 1.0 / kModulus; }

  void generate(Random& random, Supervision supervision, std::span<int32_t> tokens,
                std::span<int32_t> targets) const final {
    const size_t room = tokens.size() - 1, length = longest_expression(room);
    const std::span<int32_t> expression = tokens.subspan(room - length, length);
    std::fill(tokens.begin(), tokens.end(), kPadding);
    std::fill(targets.begin(), targets.end(), -1);
    write(random, expression);
    Calculator calculator;
    for (size_t i = 0; i < length; ++i) {
      calculator.read(expression[i]);
      if (supervision == Supervision::every_position && calculator.has_value()) {
        targets[room - length + i] = calculator.value();
      }
    }
    tokens[room] = kEquals;
    targets[room] = calculator.value();
  }

 private:
  // The largest length of an expression that is at most `room`.
  virtual size_t longest_expression(size_t room) const = 0;
  // A random expression of exactly the length of `out`.
  virtual void write(Random& random, std::span<int32_t> out) const = 0;
};

// Digits with operators between them, such as 2-3-3*2=, where * binds tighter.
class FlatArithmetic final : public ModularArithmetic {
 public:
  std::string_view name() const override { return "modular_arithmetic"; }
  int64_t vocab() const override { return kPadding + 1; }

 private:
  size_t longest_expression(size_t room) const override { return room - (room + 1) % 2; }

  void write(Random& random, std::span<int32_t> out) const override {
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = i % 2 == 0 ? random_digit(random) : random_operator(random);
    }
  }
};

// Every operation in brackets of its own, such as ((-1+4)-(2))=, split at a random place into its
// two sides; those of one and two tokens are a digit and a digit with a minus, those of three and
// four the same in brackets. So every length is possible. Without products, which would make zeros:
// then who always says 0 is right in 31% of the sequences of 256 tokens, while the paper's models
// that learn nothing here are at chance (table 5b).
class BracketedArithmetic final : public ModularArithmetic {
 public:
  std::string_view name() const override { return "modular_arithmetic_brackets"; }
  int64_t vocab() const override { return kClose + 1; }

 private:
  size_t longest_expression(size_t room) const override { return room; }

  // Random splits nest to a depth of the order of log(length): so deep is the recursion.
  void write(Random& random, std::span<int32_t> out) const override {
    if (out.size() <= 2) {
      out.front() = kMinus;
      out.back() = random_digit(random);
      return;
    }
    out.front() = kOpen;
    out.back() = kClose;
    const std::span<int32_t> inside = out.subspan(1, out.size() - 2);
    if (inside.size() <= 2) return write(random, inside);
    const auto left = static_cast<size_t>(1 + random.below(std::ssize(inside) - 2));
    inside[left] = random.below(2) == 0 ? kPlus : kMinus;
    write(random, inside.first(left));
    write(random, inside.subspan(left + 1));
  }
};

// `count` different numbers from 0 to n - 1, in random order.
std::vector<int32_t> choose(Random& random, int64_t n, int64_t count) {
  std::vector<int32_t> numbers(static_cast<size_t>(n));
  std::iota(numbers.begin(), numbers.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    std::swap(numbers[static_cast<size_t>(i)],
              numbers[static_cast<size_t>(i + random.below(n - i))]);
  }
  numbers.resize(static_cast<size_t>(count));
  return numbers;
}

// Multi-query associative recall (Arora et al. 2024): pairs of a key and its value, then each key
// once more, in random order at random places among filler, and there its value is asked. A
// sequence has as many pairs as options.pairs, or as fill its first two thirds. Tokens are keys,
// values and, last, the filler.
class AssociativeRecall final : public Task {
 public:
  explicit AssociativeRecall(const TaskOptions& options)
      : symbols_(options.symbols), pairs_(options.pairs) {
    if (symbols_ < 2) {
      input_error("{} needs at least 2 symbols to choose from, got {}", name(), symbols_);
    }
    if (pairs_ < 1 || pairs_ > symbols_) {
      input_error("the pairs of {} have different keys: there must be from 1 to {}, got {}", name(),
                  symbols_, pairs_);
    }
  }

  std::string_view name() const override { return "associative_recall"; }
  int64_t vocab() const override { return 2 * symbols_ + 1; }
  int64_t min_length() const override { return 3; }
  double chance() const override { return 1.0 / static_cast<double>(symbols_); }

  void generate(Random& random, Supervision /*supervision*/, std::span<int32_t> tokens,
                std::span<int32_t> targets) const override {
    const int64_t pairs = std::min(pairs_, std::ssize(tokens) / 3);
    const int64_t rest = std::ssize(tokens) - 2 * pairs;
    std::fill(tokens.begin(), tokens.end(), static_cast<int32_t>(2 * symbols_));
    std::fill(targets.begin(), targets.end(), -1);
    const std::vector<int32_t> keys = choose(random, symbols_, pairs);
    const std::vector<int32_t> places = choose(random, rest, pairs);
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t query =
          tokens.size() - static_cast<size_t>(rest) + static_cast<size_t>(places[i]);
      tokens[2 * i] = tokens[query] = keys[i];
      tokens[2 * i + 1] = targets[query] = static_cast<int32_t>(symbols_ + random.below(symbols_));
    }
  }

 private:
  int64_t symbols_, pairs_;
};

// A needle in a haystack: somewhere in random tokens stands a mark, then a key and the tokens to
// copy, all of one alphabet, so that only the mark tells the needle from the hay. The sequence ends
// with the mark and the key again, and the tokens to copy are asked, each after the one before it:
// # k a b c at the place of the needle, # k a b at the end, where a, b, c are the answers. The mark
// is the last token of the vocabulary.
class Needle final : public Task {
 public:
  explicit Needle(const TaskOptions& options) : symbols_(options.symbols), copied_(options.copied) {
    if (symbols_ < 2) {
      input_error("{} needs at least 2 symbols to choose from, got {}", name(), symbols_);
    }
    if (copied_ < 1) input_error("{} copies at least 1 token, got {}", name(), copied_);
  }

  std::string_view name() const override { return "needle"; }
  int64_t vocab() const override { return symbols_ + 1; }
  int64_t min_length() const override { return needle_length() + question_length(); }
  double chance() const override { return 1.0 / static_cast<double>(symbols_); }

  void generate(Random& random, Supervision /*supervision*/, std::span<int32_t> tokens,
                std::span<int32_t> targets) const override {
    for (int32_t& token : tokens) token = static_cast<int32_t>(random.below(symbols_));
    std::fill(targets.begin(), targets.end(), -1);
    const auto copied = static_cast<size_t>(copied_);
    const auto depth = static_cast<size_t>(random.below(std::ssize(tokens) - min_length() + 1));
    const auto needle = tokens.subspan(depth, static_cast<size_t>(needle_length()));
    const auto question = tokens.last(static_cast<size_t>(question_length()));
    needle.front() = static_cast<int32_t>(symbols_);
    std::copy_n(needle.begin(), question.size(), question.begin());
    std::copy_n(needle.end() - copied_, copied, targets.end() - copied_);
  }

 private:
  int64_t needle_length() const { return copied_ + 2; }
  int64_t question_length() const { return copied_ + 1; }

  int64_t symbols_, copied_;
};

}  // namespace

std::vector<std::string> task_names() {
  return {"parity", "modular_arithmetic", "modular_arithmetic_brackets", "associative_recall",
          "needle"};
}

std::string list_of_tasks() {
  return fmt::format("{}", fmt::join(task_names(), ", "));
}

std::unique_ptr<Task> make_task(std::string_view name, const TaskOptions& options) {
  if (name == "parity") return std::make_unique<Parity>();
  if (name == "modular_arithmetic") return std::make_unique<FlatArithmetic>();
  if (name == "modular_arithmetic_brackets") return std::make_unique<BracketedArithmetic>();
  if (name == "associative_recall") return std::make_unique<AssociativeRecall>(options);
  if (name == "needle") return std::make_unique<Needle>(options);
  input_error("unknown task '{}': use {}", name, list_of_tasks());
}

}  // namespace mamba3
