#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/pre_tokenizer.h"

namespace mamba3 {

// What a tokenizer.json says, checked.
struct TokenizerFile {
  std::vector<std::optional<std::string>> spellings;  // of each id, added tokens included
  std::vector<AddedToken> added_tokens;               // contents normalized where they are to be
  bool nfc = false;
  std::vector<SplitStep> pre_tokenizer;
  Bpe::Tables bpe;
  std::vector<int32_t> prefix, suffix;  // the special tokens around a text
};

// Throws InputError that names `source`, the place in the file and what is expected there.
TokenizerFile parse_tokenizer_json(std::string_view json, std::string_view source);

// The spellings of the tokens that begin and end a text, as far as a tokenizer_config.json has
// them.
struct BoundaryTokens {
  std::optional<std::string> bos, eos;
};
BoundaryTokens parse_tokenizer_config(std::string_view json, std::string_view source);

}  // namespace mamba3
