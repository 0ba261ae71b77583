#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mamba3 {

// Text to token ids and back. Two kinds: raw bytes, and the byte-level BPE of a Hugging Face
// tokenizer.json as GPT-2, GPT-NeoX and Llama 3 use it, with the ids that the `tokenizers` package
// gives for the same file. A Tokenizer is a cheap, immutable value: copies share their tables, and
// any number of threads may use one at the same time.
//
// Text need not be valid UTF-8. A byte that is not part of a character counts as a symbol of its
// own, gets its own byte tokens and comes back from decode() as it was.
class Tokenizer {
 public:
  // Ids 0..255 are the bytes.
  static Tokenizer bytes();
  // Reads a tokenizer.json, and tokenizer_config.json beside it, if there is one, for the tokens
  // that begin and end a text. Throws InputError if the file cannot be read, is malformed, or
  // describes another kind of tokenizer.
  static Tokenizer from_file(const std::filesystem::path& file);
  // As from_file(), from memory. `source` names the origin in messages.
  static Tokenizer from_json(std::string_view json, std::string_view source);
  // The tokenizer.json of a model folder, nothing if the folder has none.
  static std::optional<Tokenizer> find_in(const std::filesystem::path& folder);

  // The ids of `text`. Added tokens such as <|endoftext|> are recognised in it. add_special also
  // adds what the file's post-processor puts around a text, such as Llama 3's <|begin_of_text|>.
  std::vector<int32_t> encode(std::string_view text, bool add_special = false) const;
  // The bytes of the tokens, which need not be valid UTF-8: see StreamDecoder for text.
  // skip_special leaves special tokens out. Throws InputError for an id without a token.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;

  int64_t vocab_size() const;                          // every id is below this
  std::optional<int32_t> bos() const;                  // the token that begins a text
  const std::vector<int32_t>& eos() const;             // the tokens that end a text, may be none
  bool is_special(int32_t id) const;                   // false for an id without a token
  std::optional<std::string> token(int32_t id) const;  // as the file spells it: "Ġthe"
  std::optional<int32_t> id(std::string_view token) const;
  std::string description() const;  // "byte-level BPE, 50257 tokens"

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

// Decodes ids one by one into valid UTF-8. It holds back the bytes of a character until the
// character is whole, and turns bytes that are not UTF-8 into U+FFFD: all that push() and flush()
// return, joined, is decode() with every ill-formed sequence replaced, as the `tokenizers` package
// decodes.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special = true);

  std::string push(int32_t id);  // the characters that `id` completes; throws as decode() does
  std::string flush();           // U+FFFD for an incomplete rest; ready for another text

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::string pending_;  // the beginning of a character
};

}  // namespace mamba3
