#include "mamba3/generate.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"
#include "core/memory.h"
#include "infer/continuation.h"
#include "infer/session_impl.h"

namespace mamba3 {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

SampleArgs next_token(const Session::Impl& s, const Sampling& sampling) {
  SampleArgs args = sample_args(s.model, sampling);
  const auto window = std::min<int64_t>(sampling.repeat_window, std::ssize(s.recent));
  if (penalises(sampling) && window > 0) {
    args.history = view_of(s.recent.data() + std::ssize(s.recent) - window, {1, window});
  }
  return args;
}

}  // namespace

Generation generate(Session& session, std::span<const int32_t> prompt,
                    const GenerateOptions& options, const OnToken& on_token) {
  check_options(options);
  const Model& model = session.model();
  Continuation text(model, options);
  if (prompt.empty() && session.length() == 0) {
    input_error("the prompt is empty: give at least one token to continue from");
  }
  Session::Impl& s = session.impl();
  text.result.prompt_tokens = std::ssize(prompt);
  const Clock::time_point begin = Clock::now();
  session.append(prompt);
  synchronize(s.engine.context());
  text.result.prompt_seconds = seconds_since(begin);
  while (!text.ended()) {
    s.engine.decode(next_token(s, options.sampling), [&](std::span<const int32_t> tokens) {
      s.note(tokens);
      text.take(tokens.front(), on_token);
    });
  }
  text.finish(on_token);
  text.result.seconds = seconds_since(begin) - text.result.prompt_seconds;
  return std::move(text.result);
}

Generation generate(Session& session, std::string_view prompt, const GenerateOptions& options,
                    const OnToken& on_token) {
  const std::vector<int32_t> tokens =
      encode_prompt(session.model().tokenizer(), prompt, session.length() == 0);
  return generate(session, tokens, options, on_token);
}

}  // namespace mamba3
