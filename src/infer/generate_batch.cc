#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "core/memory.h"
#include "infer/continuation.h"
#include "infer/session_impl.h"

namespace mamba3 {

namespace {

using Clock = std::chrono::steady_clock;
using Prompts = std::span<const std::vector<int32_t>>;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void check_prompts(Prompts prompts, int64_t vocab) {
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (prompts[i].empty()) input_error("prompt {} is empty: give at least one token", i);
    for (size_t t = 0; t < prompts[i].size(); ++t) {
      const int32_t id = prompts[i][t];
      if (id >= 0 && id < vocab) continue;
      input_error("prompt {}: token id {} at position {} is out of range: this model knows 0 to {}",
                  i, id, t, vocab - 1);
    }
  }
}

// A sequence in a row of the engine.
struct Sequence {
  int32_t row;
  std::vector<int32_t> recent;  // for the repeat penalty
  Continuation text;
};

// As many prompts as the engine has rows, or fewer.
class Group {
 public:
  Group(const Model& model, const GenerateOptions& options, Engine& engine, int64_t first_index,
        const OnGeneration& on_generation, std::span<Generation> out)
      : model_(model),
        options_(options),
        engine_(engine),
        first_index_(first_index),
        on_generation_(on_generation),
        out_(out) {}

  void run(Prompts prompts) {
    engine_.reset();
    read(prompts);
    begin_ = Clock::now();
    let_go();
    while (!sequences_.empty()) {
      engine_.decode(next_tokens(), [&](std::span<const int32_t> tokens) { take(tokens); });
      let_go();
    }
  }

 private:
  // All prompts together. One that an earlier row has too is not read again.
  void read(Prompts prompts) {
    const Clock::time_point begin = Clock::now();
    std::vector<int32_t> rows, earlier;  // of the different prompts; for each prompt, its first row
    std::vector<std::span<const int32_t>> different;
    int64_t tokens = 0;
    for (auto prompt = prompts.begin(); prompt != prompts.end(); ++prompt) {
      const auto row = static_cast<int32_t>(prompt - prompts.begin());
      earlier.push_back(
          static_cast<int32_t>(std::find(prompts.begin(), prompt, *prompt) - prompts.begin()));
      tokens += std::ssize(*prompt);
      if (earlier.back() != row) continue;
      rows.push_back(row);
      different.emplace_back(*prompt);
    }
    engine_.select(rows);
    engine_.read(different);
    for (size_t i = 0; i < prompts.size(); ++i) {
      const auto row = static_cast<int32_t>(i);
      if (earlier[i] != row) engine_.fork(earlier[i], row);
    }
    synchronize(engine_.context());
    const double seconds_per_token = seconds_since(begin) / static_cast<double>(tokens);
    for (size_t i = 0; i < prompts.size(); ++i) {
      sequences_.push_back({static_cast<int32_t>(i), prompts[i], Continuation(model_, options_)});
      Generation& result = sequences_.back().text.result;
      result.prompt_tokens = std::ssize(prompts[i]);
      result.prompt_seconds = seconds_per_token * static_cast<double>(prompts[i].size());
      if (options_.max_tokens == 0) end(sequences_.back());
    }
  }

  SampleArgs next_tokens() {
    SampleArgs args = sample_args(model_, options_.sampling);
    args.first_row = static_cast<uint32_t>(first_index_);
    if (!penalises(options_.sampling)) return args;
    const int64_t B = std::ssize(sequences_), L = options_.sampling.repeat_window;
    history_.assign(static_cast<size_t>(B * L), -1);
    for (int64_t b = 0; b < B; ++b) {
      const std::vector<int32_t>& recent = sequences_[static_cast<size_t>(b)].recent;
      const int64_t n = std::min(L, std::ssize(recent));
      std::copy(recent.end() - n, recent.end(), history_.begin() + b * L);
    }
    args.history = view_of(history_.data(), {B, L});
    return args;
  }

  void take(std::span<const int32_t> tokens) {
    for (size_t b = 0; b < tokens.size(); ++b) {
      Sequence& s = sequences_[b];
      if (s.text.ended()) continue;
      s.recent.push_back(tokens[b]);
      s.text.take(tokens[b]);
      if (s.text.ended()) end(s);
    }
  }

  void end(Sequence& s) {
    s.text.finish();
    if (options_.max_tokens > 0) s.text.result.seconds = seconds_since(begin_);
    out_[static_cast<size_t>(s.row)] = s.text.result;
    if (on_generation_) on_generation_(first_index_ + s.row, s.text.result);
  }

  // Takes what has ended out of the batch, and selects the rest. The GPU records its step anew for
  // another batch, so there they only leave when they are half of it.
  void let_go() {
    const int64_t B = std::ssize(sequences_);
    const int64_t ended = std::count_if(sequences_.begin(), sequences_.end(),
                                        [](const Sequence& s) { return s.text.ended(); });
    const bool worth_it = engine_.context().device == Device::cpu ? ended > 0 : 2 * ended >= B;
    if (selected_ && !worth_it) return;
    std::erase_if(sequences_, [](const Sequence& s) { return s.text.ended(); });
    selected_ = true;
    std::vector<int32_t> rows;
    for (const Sequence& s : sequences_) rows.push_back(s.row);
    if (!rows.empty()) engine_.select(rows);
  }

  const Model& model_;
  const GenerateOptions& options_;
  Engine& engine_;
  int64_t first_index_;
  const OnGeneration& on_generation_;
  std::span<Generation> out_;
  std::vector<Sequence> sequences_;  // of the batch, in its order
  bool selected_ = false;
  std::vector<int32_t> history_;
  Clock::time_point begin_;
};

}  // namespace

std::vector<Generation> generate_batch(const Model& model, Prompts prompts,
                                       const BatchOptions& options,
                                       const OnGeneration& on_generation) {
  check_options(options.generate);
  if (options.parallel < 1) {
    input_error("sequences that run at once must be 1 or more, got {}", options.parallel);
  }
  check_prompts(prompts, model.info().vocab);
  std::vector<Generation> out(prompts.size());
  if (prompts.empty()) return out;
  const size_t rows = std::min(prompts.size(), static_cast<size_t>(options.parallel));
  const LanguageModel& language_model = model.impl().language_model;
  Engine engine(language_model, static_cast<int64_t>(rows), options.session.threads,
                state_types(language_model, options.session.state_dtype));
  for (size_t begin = 0; begin < prompts.size(); begin += rows) {
    const size_t n = std::min(rows, prompts.size() - begin);
    Group group(model, options.generate, engine, static_cast<int64_t>(begin), on_generation,
                std::span(out).subspan(begin, n));
    group.run(prompts.subspan(begin, n));
  }
  return out;
}

std::vector<Generation> generate_batch(const Model& model, std::span<const std::string> prompts,
                                       const BatchOptions& options,
                                       const OnGeneration& on_generation) {
  std::vector<std::vector<int32_t>> tokens;
  for (const std::string& prompt : prompts) {
    tokens.push_back(encode_prompt(model.tokenizer(), prompt, true));
  }
  return generate_batch(model, tokens, options, on_generation);
}

}  // namespace mamba3
