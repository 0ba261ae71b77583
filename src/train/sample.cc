#include "train/sample.h"

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "infer/engine.h"

namespace mamba3 {

namespace {

// Enough freedom not to repeat itself, not so much that a small model loses the thread.
constexpr float kTemperature = 0.8f;
constexpr int32_t kTopK = 40;

}  // namespace

std::string sample_text(const LanguageModel& model, const Tokenizer& tokenizer,
                        const TextSampleOptions& options) {
  std::vector<int32_t> prompt = tokenizer.encode(options.prompt, true);
  if (prompt.empty()) input_error("the prompt of a sample has no tokens");
  Engine engine(model, 1, options.threads);
  engine.append(make_view(prompt.data(), DType::i32, {1, std::ssize(prompt)}));
  StreamDecoder decoder(tokenizer);
  const std::vector<int32_t>& eos = tokenizer.eos();
  const int64_t vocab = std::min(model.config.vocab, tokenizer.vocab_size());
  std::string text;
  for (int64_t i = 0; i < options.tokens; ++i) {
    int32_t id = engine
                     .draw({.vocab = vocab,
                            .temperature = kTemperature,
                            .top_k = kTopK,
                            .seed = options.seed,
                            .position = static_cast<uint64_t>(i)})
                     .front();
    if (std::find(eos.begin(), eos.end(), id) != eos.end()) break;
    text += decoder.push(id);
    engine.append(make_view(&id, DType::i32, {1, 1}));
  }
  return text + decoder.flush();
}

}  // namespace mamba3
