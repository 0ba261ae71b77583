#include "train/batch.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace mamba3 {

namespace {

// The held-out sequences of a task are the same for every run, so that runs can be compared.
constexpr uint64_t kValidationSeed = 1;

void copy_window(std::span<const int32_t> stream, int64_t begin, std::span<int32_t> tokens,
                 std::span<int32_t> targets) {
  const auto from = stream.begin() + begin;
  std::copy_n(from, tokens.size(), tokens.begin());
  std::copy_n(from + 1, targets.size(), targets.begin());
}

}  // namespace

void Batch::resize(int64_t rows, int64_t length) {
  B = rows;
  T = length;
  tokens.resize(static_cast<size_t>(rows * length));
  targets.resize(static_cast<size_t>(rows * length));
}

std::span<int32_t> Batch::row_tokens(int64_t b) {
  return std::span(tokens).subspan(static_cast<size_t>(b * T), static_cast<size_t>(T));
}

std::span<int32_t> Batch::row_targets(int64_t b) {
  return std::span(targets).subspan(static_cast<size_t>(b * T), static_cast<size_t>(T));
}

int64_t Batch::scored() const {
  return static_cast<int64_t>(targets.size()) - std::count(targets.begin(), targets.end(), -1);
}

TextSource::TextSource(std::span<const int32_t> train, std::span<const int32_t> held_out,
                       const Options& options)
    : train_(train),
      held_out_(held_out),
      options_(options),
      seed_(derive_seed(options.seed, "text windows")) {
  const int64_t tokens = std::ssize(train), held = std::ssize(held_out);
  if (tokens < options.T + 1) {
    input_error(
        "the training text has {} tokens, but a context of {} needs at least {}: give more text or "
        "a smaller --context",
        tokens, options.T, options.T + 1);
  }
  if (held < 2) return;
  validation_length_ = std::min(options.T, held - 1);
  validation_rows_ = (held - 1) / validation_length_;
  validation_rows_ =
      std::clamp<int64_t>(options.validation_tokens / validation_length_, 1, validation_rows_);
}

void TextSource::train(int64_t step, double /*progress*/, int64_t first_row, int64_t rows,
                       Batch& out) const {
  out.resize(rows, options_.T);
  for (int64_t b = 0; b < rows; ++b) {
    Random random(seed_, static_cast<uint64_t>(step), static_cast<uint32_t>(first_row + b));
    const int64_t begin = random.below(std::ssize(train_) - options_.T);
    copy_window(train_, begin, out.row_tokens(b), out.row_targets(b));
  }
}

void TextSource::validate(int64_t first_row, int64_t rows, Batch& out) const {
  out.resize(rows, validation_length_);
  for (int64_t b = 0; b < rows; ++b) {
    copy_window(held_out_, (first_row + b) * validation_length_, out.row_tokens(b),
                out.row_targets(b));
  }
}

int64_t Curriculum::at(double progress) const {
  if (progress >= growth) return last;
  const double ratio = static_cast<double>(last) / static_cast<double>(first);
  const double length = static_cast<double>(first) * std::pow(ratio, progress / growth);
  return static_cast<int64_t>(std::lround(length));
}

TaskSource::TaskSource(const Task& task, const Options& options)
    : task_(task),
      options_(options),
      train_seed_(derive_seed(options.seed, "task")),
      length_seed_(derive_seed(options.seed, "task length")),
      validation_seed_(derive_seed(kValidationSeed, "task validation")) {
  const Curriculum& length = options.length;
  if (length.first < task.min_length() || length.last < length.first) {
    input_error("the lengths of {} must rise from at least {}, got {} to {}", task.name(),
                task.min_length(), length.first, length.last);
  }
  if (options.shortest != 0 &&
      (options.shortest < task.min_length() || options.shortest > length.first)) {
    input_error("the shortest sequence of {} must have from {} to {} tokens, got {}", task.name(),
                task.min_length(), length.first, options.shortest);
  }
  if (!(length.growth >= 0) || length.growth > 1) {
    input_error("the curriculum grows for a part of the run, from 0 to 1, got {}", length.growth);
  }
  if (options.validation_rows > 0 && options.validation_length < task.min_length()) {
    input_error("{} is evaluated at lengths from {} up, got {}", task.name(), task.min_length(),
                options.validation_length);
  }
}

int64_t TaskSource::length_of(int64_t step, double progress) const {
  const int64_t longest = options_.length.at(progress), shortest = options_.shortest;
  if (shortest == 0) return longest;
  return shortest + Random(length_seed_, static_cast<uint64_t>(step)).below(longest - shortest + 1);
}

void TaskSource::train(int64_t step, double progress, int64_t first_row, int64_t rows,
                       Batch& out) const {
  const int64_t T = length_of(step, progress);
  out.resize(rows, T);
  for (int64_t b = 0; b < rows; ++b) {
    Random random(train_seed_, static_cast<uint64_t>(step), static_cast<uint32_t>(first_row + b));
    const std::span<int32_t> tokens = out.row_tokens(b), targets = out.row_targets(b);
    int64_t length = T;
    if (options_.supervision == Supervision::final_answer) {
      length = task_.min_length() + random.below(T - task_.min_length() + 1);
    }
    const auto used = static_cast<size_t>(length);
    std::fill(tokens.begin() + length, tokens.end(), 0);
    std::fill(targets.begin() + length, targets.end(), -1);
    task_.generate(random, options_.supervision, tokens.first(used), targets.first(used));
  }
}

void TaskSource::validate(int64_t first_row, int64_t rows, Batch& out) const {
  out.resize(rows, options_.validation_length);
  for (int64_t b = 0; b < rows; ++b) {
    // Streams are named by length: a longer sequence does not begin with a shorter one.
    Random random(validation_seed_, static_cast<uint64_t>(options_.validation_length),
                  static_cast<uint32_t>(first_row + b));
    task_.generate(random, Supervision::final_answer, out.row_tokens(b), out.row_targets(b));
  }
}

}  // namespace mamba3
