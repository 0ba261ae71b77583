#pragma once

#include <memory>
#include <optional>
#include <string_view>

#include "mamba3/generate.h"
#include "ops/sample.h"

namespace mamba3 {

// Throws InputError for options out of their range.
void check_options(const GenerateOptions& options);

// The ids of a prompt; `first`: it begins a text. Throws InputError if there are none then.
std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer, std::string_view prompt, bool first);

// The draw of a token of the model, without a history.
SampleArgs sample_args(const Model& model, const Sampling& sampling);

// Whether the draw wants the history.
bool penalises(const Sampling& sampling);

// One text that is being generated: takes the drawn tokens and says when it ends.
class Continuation {
 public:
  // Keeps references to both.
  Continuation(const Model& model, const GenerateOptions& options);
  Continuation(Continuation&&) noexcept;
  Continuation& operator=(Continuation&&) noexcept;
  ~Continuation();

  void take(int32_t token, const OnToken& on_token = {});
  bool ended() const { return ended_; }
  // Adds what was held back to the text.
  void finish(const OnToken& on_token = {});

  Generation result;

 private:
  class TextStream;
  const Model* model_;
  const GenerateOptions* options_;
  std::unique_ptr<TextStream> stream_;
  bool ended_;
};

}  // namespace mamba3
