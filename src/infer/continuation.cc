#include "infer/continuation.h"

#include <algorithm>

#include "core/error.h"
#include "infer/session_impl.h"
#include "infer/stop_scanner.h"

namespace mamba3 {

namespace {

bool ends_text(const Model& model, int32_t token) {
  if (!model.has_tokenizer()) return false;
  const std::vector<int32_t>& eos = model.tokenizer().eos();
  return std::find(eos.begin(), eos.end(), token) != eos.end();
}

}  // namespace

void check_options(const GenerateOptions& options) {
  const Sampling& s = options.sampling;
  const auto check = [](bool holds, std::string_view what, auto got, std::string_view want) {
    if (!holds) input_error("{} must be {}, got {}", what, want, got);
  };
  check(options.max_tokens >= 0, "the number of tokens to generate", options.max_tokens,
        "0 or more");
  check(s.temperature >= 0, "temperature", s.temperature, "0 or more");
  check(s.top_k >= 0, "top-k", s.top_k, "0 (off) or more");
  check(s.top_p > 0 && s.top_p <= 1, "top-p", s.top_p, "above 0 and at most 1");
  check(s.min_p >= 0 && s.min_p <= 1, "min-p", s.min_p, "between 0 and 1");
  check(s.repeat_penalty > 0, "the repeat penalty", s.repeat_penalty, "above 0");
  check(s.repeat_window >= 0 && s.repeat_window <= kRecentTokens, "the repeat window",
        s.repeat_window, fmt::format("between 0 and {}", kRecentTokens));
}

std::string_view name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::length:
      return "length";
    case FinishReason::eos:
      return "eos";
    case FinishReason::stop:
      return "stop";
    case FinishReason::callback:
      return "callback";
  }
  return "?";
}

std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view prompt,
                                   bool first) {
  std::vector<int32_t> tokens = tokenizer.encode(prompt, first);
  if (tokens.empty() && first && tokenizer.bos()) tokens.push_back(*tokenizer.bos());
  if (tokens.empty() && first) {
    input_error(
        "the prompt is empty, and this model's tokenizer ({}) has no token that begins a text: "
        "give at least one character",
        tokenizer.description());
  }
  return tokens;
}

SampleArgs sample_args(const Model& model, const Sampling& sampling) {
  return {.vocab = model.info().vocab,
          .temperature = sampling.temperature,
          .top_k = sampling.top_k,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .repeat_penalty = sampling.repeat_penalty,
          .seed = sampling.seed};
}

bool penalises(const Sampling& sampling) {
  return sampling.repeat_penalty != 1 && sampling.repeat_window > 0;
}

// The text of drawn tokens as it can be shown: decoded, and scanned for stop texts. Without a
// tokenizer there is none.
class Continuation::TextStream {
 public:
  TextStream(const Model& model, const std::vector<std::string>& stops)
      : model_(model), scanner_(stops) {
    if (model.has_tokenizer() || !stops.empty()) decoder_.emplace(model.tokenizer());
  }

  std::string push(int32_t id) {
    // A model may have more ids than its tokenizer has tokens.
    if (!decoder_ || !model_.tokenizer().token(id)) return {};
    return scanner_.push(decoder_->push(id));
  }
  bool stopped() const { return scanner_.stopped(); }
  std::string finish() {
    if (!decoder_ || stopped()) return {};
    std::string rest = scanner_.push(decoder_->flush());
    rest += scanner_.finish();
    return rest;
  }

 private:
  const Model& model_;
  std::optional<StreamDecoder> decoder_;
  StopScanner scanner_;
};

Continuation::Continuation(const Model& model, const GenerateOptions& options)
    : model_(&model),
      options_(&options),
      stream_(std::make_unique<TextStream>(model, options.stop)),
      ended_(options.max_tokens == 0) {}
Continuation::Continuation(Continuation&&) noexcept = default;
Continuation& Continuation::operator=(Continuation&&) noexcept = default;
Continuation::~Continuation() = default;

void Continuation::take(int32_t token, const OnToken& on_token) {
  const auto end = [&](FinishReason reason) {
    result.finish_reason = reason;
    ended_ = true;
  };
  result.tokens.push_back(token);
  const std::string text = stream_->push(token);
  result.text += text;
  const bool go_on = !on_token || on_token({.id = token, .text = text});
  if (stream_->stopped()) return end(FinishReason::stop);
  if (options_->stop_at_eos && ends_text(*model_, token)) return end(FinishReason::eos);
  if (!go_on) return end(FinishReason::callback);
  if (std::ssize(result.tokens) >= options_->max_tokens) end(FinishReason::length);
}

void Continuation::finish(const OnToken& on_token) {
  const std::string rest = stream_->finish();
  result.text += rest;
  if (!rest.empty() && on_token) on_token({.id = -1, .text = rest});
}

}  // namespace mamba3
