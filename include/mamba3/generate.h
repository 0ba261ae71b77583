#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "mamba3/session.h"

namespace mamba3 {

// How the next token is chosen. The filters apply in this order: repeat penalty, top-k, top-p and
// min-p on the distribution at temperature 1, then the temperature.
struct Sampling {
  float temperature = 0.8f;     // 0: always the most likely token
  int32_t top_k = 40;           // only the k most likely; 0: off
  float top_p = 0.95f;          // only the most likely that together have this probability; 1: off
  float min_p = 0.05f;          // only those with at least this fraction of the largest; 0: off
  float repeat_penalty = 1.0f;  // above 1: recent tokens become less likely
  int64_t repeat_window = 64;   // tokens that are recent
  uint64_t seed = 0;            // the same seed draws the same text
};

struct GenerateOptions {
  int64_t max_tokens = 128;
  Sampling sampling = {};
  // Texts that end the generation; they are not part of the result.
  std::vector<std::string> stop = {};
  bool stop_at_eos = true;  // end at the tokenizer's end-of-text token
};

// What the callback sees, once for every drawn token and, if text was held back, once more.
struct GeneratedToken {
  int32_t id = -1;  // -1 at the end, when held-back text is let go
  // What can be shown now: whole characters, and nothing that may turn out to be part of a stop
  // text.
  std::string_view text;
};

// Returns whether to go on.
using OnToken = std::function<bool(const GeneratedToken&)>;

enum class FinishReason : uint8_t { length, eos, stop, callback };
std::string_view name_of(FinishReason reason);  // "length", ...

struct Generation {
  std::vector<int32_t> tokens;  // as drawn, the end-of-text token included
  std::string text;             // without a stop text
  FinishReason finish_reason = FinishReason::length;
  int64_t prompt_tokens = 0;
  double prompt_seconds = 0;  // of prompts that were read together, this one's share by tokens
  double seconds = 0;         // of the generation, without the prompt
};

// Reads the prompt, then draws tokens until an option, the callback or the end-of-text token says
// stop. Afterwards the session has read the prompt and every token that was drawn, so a further
// call continues the text. The prompt may be empty if the session is not.
Generation generate(Session& session, std::span<const int32_t> prompt,
                    const GenerateOptions& options = {}, const OnToken& on_token = {});

// The same from text. A session without tokens starts with what the tokenizer puts before a text
// (BOS, if it has one). Throws InputError for a prompt that gives no tokens then.
Generation generate(Session& session, std::string_view prompt, const GenerateOptions& options = {},
                    const OnToken& on_token = {});

struct BatchOptions {
  GenerateOptions generate = {};
  SessionOptions session = {};
  int64_t parallel = 64;  // sequences that run at once, each with a state of its own
};

// Called for every prompt when its continuation has ended, in the order in which they end.
using OnGeneration = std::function<void(int64_t index, const Generation& generation)>;

// Continues many prompts, which are read and then continued together. Every prompt,
// also one that is given several times, has draws of its own, which depend on the seed and its
// index only: the first draws what generate() draws. Throws InputError that names the prompt for an
// empty one or a token that the model does not have, before anything runs.
std::vector<Generation> generate_batch(const Model& model,
                                       std::span<const std::vector<int32_t>> prompts,
                                       const BatchOptions& options = {},
                                       const OnGeneration& on_generation = {});

// The same from texts.
std::vector<Generation> generate_batch(const Model& model, std::span<const std::string> prompts,
                                       const BatchOptions& options = {},
                                       const OnGeneration& on_generation = {});

}  // namespace mamba3
