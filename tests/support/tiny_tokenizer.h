#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "mamba3/tokenizer.h"
#include "tokenizer/byte_level.h"

namespace mamba3::testing {

// A tokenizer.json as small as it can be: the 256 bytes in order, then "ab" and "abc".
inline nlohmann::json tiny_tokenizer_json() {
  nlohmann::json vocab;
  for (int byte = 0; byte < 256; ++byte) {
    vocab[byte_level_spelling(std::string(1, static_cast<char>(byte)))] = byte;
  }
  vocab["ab"] = 256;
  vocab["abc"] = 257;
  const nlohmann::json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}};
  return {{"version", "1.0"},
          {"added_tokens", nlohmann::json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", "ab c"}}}}};
}

inline nlohmann::json added_token(int id, const std::string& content, bool special = false) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

inline Tokenizer tiny_tokenizer(const nlohmann::json& patch = nlohmann::json::object()) {
  nlohmann::json file = tiny_tokenizer_json();
  file.merge_patch(patch);
  return Tokenizer::from_json(file.dump(), "tiny.json");
}

}  // namespace mamba3::testing
