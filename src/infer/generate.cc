#include "mamba3/generate.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "core/error.h"
#include "infer/session_impl.h"
#include "infer/stop_scanner.h"

namespace mamba3 {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

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

SampleArgs sample_args(Session& session, const Sampling& sampling) {
  const Session::Impl& s = session.impl();
  const auto window = std::min<int64_t>(sampling.repeat_window, std::ssize(s.recent));
  const bool penalise = sampling.repeat_penalty != 1 && window > 0;
  return {.vocab = session.model().info().vocab,
          .history = penalise
                         ? view_of(s.recent.data() + std::ssize(s.recent) - window, {1, window})
                         : View{},
          .temperature = sampling.temperature,
          .top_k = sampling.top_k,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .repeat_penalty = sampling.repeat_penalty,
          .seed = sampling.seed};
}

// The text of drawn tokens as it can be shown: decoded, and scanned for stop texts. Without a
// tokenizer there is none.
class TextStream {
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

bool ends_text(const Model& model, int32_t token) {
  if (!model.has_tokenizer()) return false;
  const std::vector<int32_t>& eos = model.tokenizer().eos();
  return std::find(eos.begin(), eos.end(), token) != eos.end();
}

// Draws, reads and shows tokens until something says stop.
FinishReason draw_tokens(Session& session, const GenerateOptions& options, const OnToken& on_token,
                         TextStream& stream, Generation& out) {
  Session::Impl& s = session.impl();
  std::optional<FinishReason> reason;
  const auto look_at = [&](std::span<const int32_t> tokens) {
    s.note(tokens);
    const int32_t token = tokens.front();
    out.tokens.push_back(token);
    const std::string text = stream.push(token);
    out.text += text;
    if (on_token && !on_token({.id = token, .text = text})) reason = FinishReason::callback;
    if (options.stop_at_eos && ends_text(session.model(), token)) reason = FinishReason::eos;
    if (stream.stopped()) reason = FinishReason::stop;
  };
  while (!reason && std::ssize(out.tokens) < options.max_tokens) {
    s.engine.decode(sample_args(session, options.sampling), look_at);
  }
  return reason.value_or(FinishReason::length);
}

}  // namespace

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

Generation generate(Session& session, std::span<const int32_t> prompt,
                    const GenerateOptions& options, const OnToken& on_token) {
  check_options(options);
  TextStream stream(session.model(), options.stop);
  if (prompt.empty() && session.length() == 0) {
    input_error("the prompt is empty: give at least one token to continue from");
  }
  Generation out;
  out.prompt_tokens = std::ssize(prompt);
  const Clock::time_point begin = Clock::now();
  session.append(prompt);
  out.prompt_seconds = seconds_since(begin);
  out.finish_reason = draw_tokens(session, options, on_token, stream, out);
  const std::string rest = stream.finish();
  out.text += rest;
  if (!rest.empty() && on_token) on_token({.id = -1, .text = rest});
  out.seconds = seconds_since(begin) - out.prompt_seconds;
  return out;
}

Generation generate(Session& session, std::string_view prompt, const GenerateOptions& options,
                    const OnToken& on_token) {
  const Tokenizer& tokenizer = session.model().tokenizer();
  const bool first = session.length() == 0;
  std::vector<int32_t> tokens = tokenizer.encode(prompt, first);
  if (tokens.empty() && first && tokenizer.bos()) tokens.push_back(*tokenizer.bos());
  if (tokens.empty() && first) {
    input_error(
        "the prompt is empty, and this model's tokenizer ({}) has no token that begins a text: "
        "give at least one character",
        tokenizer.description());
  }
  return generate(session, tokens, options, on_token);
}

}  // namespace mamba3
