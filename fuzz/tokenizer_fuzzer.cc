// Any bytes as a tokenizer.json, or as a text: nothing crashes or hangs, and texts come back.

#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "../tests/support/tiny_tokenizer.h"
#include "mamba3/error.h"
#include "mamba3/tokenizer.h"
#include "tokenizer/utf8.h"

namespace mamba3 {
namespace {

using nlohmann::json;

void require(bool holds) {
  if (!holds) std::abort();
}

void load(std::string_view text) {
  try {
    const Tokenizer tokenizer = Tokenizer::from_json(text, "fuzz");
    tokenizer.decode(tokenizer.encode("ab abc <x>\t12 \xC3\xA9\xFF", true));
  } catch (const Error&) {  // bad input, or a regular expression that takes too many steps
  }
}

json split(const char* pattern) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

std::vector<Tokenizer> tokenizers_that_keep_the_text() {
  const json tokens = {testing::added_token(258, "<x>"), testing::added_token(259, "  ")};
  const json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  const char* llama3 =
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
      R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
  const json sequence = {{"type", "Sequence"}, {"pretokenizers", {split(llama3), byte_level}}};
  return {testing::tiny_tokenizer({{"added_tokens", tokens}}),
          testing::tiny_tokenizer({{"pre_tokenizer", sequence}}), Tokenizer::bytes()};
}

void check_round_trip(const Tokenizer& tokenizer, const std::string& text) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  require(tokenizer.decode(ids) == text);
  StreamDecoder decoder(tokenizer);
  std::string streamed;
  for (const int32_t id : ids) streamed += decoder.push(id);
  streamed += decoder.flush();
  require(streamed == to_valid_utf8(text));
}

void check_texts(const std::string& text) {
  static const std::vector<Tokenizer> keepers = tokenizers_that_keep_the_text();
  static const Tokenizer composer = testing::tiny_tokenizer({{"normalizer", {{"type", "NFC"}}}});
  for (const Tokenizer& tokenizer : keepers) check_round_trip(tokenizer, text);
  const std::string composed = composer.decode(composer.encode(text));
  require(composer.decode(composer.encode(composed)) == composed);
}

}  // namespace
}  // namespace mamba3

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  mamba3::load(text);
  mamba3::check_texts(text);
  return 0;
}
