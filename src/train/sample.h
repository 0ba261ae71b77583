#pragma once

#include <cstdint>
#include <string>

#include "mamba3/tokenizer.h"
#include "model/language_model.h"

namespace mamba3 {

struct TextSampleOptions {
  std::string prompt = "\n";
  int64_t tokens = 128;
  uint64_t seed = 0;
  int threads = 0;
};

// What a model that is being trained writes after the prompt, valid UTF-8, until the tokenizer's
// end of text. Throws InputError for a prompt without tokens.
std::string sample_text(const LanguageModel& model, const Tokenizer& tokenizer,
                        const TextSampleOptions& options);

}  // namespace mamba3
