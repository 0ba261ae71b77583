#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "mamba3/model.h"

namespace mamba3 {

struct SessionOptions {
  int threads = 0;  // 0: as many as the process may use
  // The type of the recurrent state: "f32", or on the GPU also "bf16", which halves it and rounds
  // at every token.
  std::string state_dtype = "f32";
};

// One sequence of tokens that a model reads and continues. Its state has a fixed size (plus caches
// in hybrids with attention), so the length is not limited. For one thread at a time.
class Session {
 public:
  explicit Session(const Model& model, const SessionOptions& options = {});
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  const Model& model() const;
  int64_t length() const;  // tokens so far

  // Reads more tokens. Throws InputError, having changed nothing, for an id that the model does not
  // have.
  void append(std::span<const int32_t> tokens);
  // The same, and returns the logits after each of the tokens: tokens.size() rows of info().vocab.
  std::vector<float> append_with_logits(std::span<const int32_t> tokens);

  // The logits of the next token, one for each id below info().vocab. Valid until the next call.
  // Throws InputError before the first token.
  std::span<const float> logits();

  void reset();  // back to no tokens

  // The state as a safetensors file, written whole or not at all, and read back. A file that
  // another model wrote is refused with InputError.
  void save(const std::filesystem::path& file);
  void load(const std::filesystem::path& file);

  struct Impl;  // of the library's own use
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace mamba3
