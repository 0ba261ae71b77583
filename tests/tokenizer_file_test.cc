// Tokenizer files that are malformed, absurd or of another kind.

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mamba3/tokenizer.h"
#include "support/errors.h"
#include "support/tiny_tokenizer.h"

namespace mamba3 {
namespace {

using nlohmann::json;
using testing::added_token;
using testing::input_error_of;
using testing::tiny_tokenizer_json;

std::string error_of_text(const std::string& text) {
  return input_error_of([&] { Tokenizer::from_json(text, "t.json"); });
}

struct BadFile {
  const char* name;
  std::function<void(json&)> spoil;
  const char* message;  // behind "t.json: "
};

void PrintTo(const BadFile& file, std::ostream* out) {
  *out << file.name;
}

json split(const std::string& pattern) {
  return {{"type", "Split"},
          {"pattern", {{"Regex", pattern}}},
          {"behavior", "Isolated"},
          {"invert", false}};
}

json sequence(const std::string& key, const std::vector<json>& parts) {
  return {{"type", "Sequence"}, {key, parts}};
}

json template_of(json single, json special_tokens = json::object()) {
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", json::array()},
          {"special_tokens", special_tokens}};
}

const json kText = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
const json kBegin = {{"SpecialToken", {{"id", "begin"}, {"type_id", 0}}}};

const BadFile kBadFiles[] = {
    // Other kinds of tokenizers.
    {"unigram",
     [](json& f) {
       f["model"] = {{"type", "Unigram"}, {"vocab", {{"a", 0.5}}}};
     },
     "model: the type \"Unigram\" is not supported; supported: BPE (byte-level, as GPT-2, GPT-NeoX "
     "and Llama 3 use it)"},
    {"word_piece", [](json& f) { f["model"]["type"] = "WordPiece"; },
     "model: the type \"WordPiece\" is not supported; supported: BPE (byte-level, as GPT-2, "
     "GPT-NeoX and Llama 3 use it)"},
    {"word_level", [](json& f) { f["model"]["type"] = "WordLevel"; },
     "model: the type \"WordLevel\" is not supported; supported: BPE (byte-level, as GPT-2, "
     "GPT-NeoX and Llama 3 use it)"},
    {"not_byte_level",
     [](json& f) {
       f["pre_tokenizer"] = {{"type", "Metaspace"}};
     },
     "pre_tokenizer does not end with ByteLevel; only byte-level tokenizers, as GPT-2, GPT-NeoX "
     "and Llama 3 have, are supported"},
    {"no_pre_tokenizer", [](json& f) { f["pre_tokenizer"] = nullptr; },
     "pre_tokenizer does not end with ByteLevel; only byte-level tokenizers, as GPT-2, GPT-NeoX "
     "and Llama 3 have, are supported"},
    // Parts of another kind.
    {"normalizer",
     [](json& f) {
       f["normalizer"] = {{"type", "NFKC"}};
     },
     "normalizer: the type \"NFKC\" is not supported; supported: NFC, a Sequence of NFC, or none"},
    {"normalizer_in_sequence",
     [](json& f) {
       f["normalizer"] = sequence("normalizers", {{{"type", "NFC"}}, {{"type", "Lowercase"}}});
     },
     "normalizer.normalizers[1]: the type \"Lowercase\" is not supported; supported: NFC, a "
     "Sequence of NFC, or none"},
    {"pre_tokenizer_in_sequence",
     [](json& f) {
       f["pre_tokenizer"] = sequence("pretokenizers", {{{"type", "Digits"}}, f["pre_tokenizer"]});
     },
     "pre_tokenizer.pretokenizers[0]: the type \"Digits\" is not supported; supported: Split, and "
     "ByteLevel as the last one"},
    {"byte_level_twice",
     [](json& f) {
       f["pre_tokenizer"] = sequence("pretokenizers", {f["pre_tokenizer"], f["pre_tokenizer"]});
     },
     "pre_tokenizer.pretokenizers[0]: the type \"ByteLevel\" is not supported; supported: Split, "
     "and ByteLevel as the last one"},
    {"nested_sequence",
     [](json& f) {
       f["pre_tokenizer"] = sequence(
           "pretokenizers", {sequence("pretokenizers", {f["pre_tokenizer"]}), f["pre_tokenizer"]});
     },
     "pre_tokenizer.pretokenizers[0]: a Sequence within a Sequence is not supported"},
    {"decoder",
     [](json& f) {
       f["decoder"] = {{"type", "Metaspace"}};
     },
     "decoder: the type \"Metaspace\" is not supported; supported: ByteLevel"},
    {"no_decoder", [](json& f) { f["decoder"] = nullptr; },
     "decoder is missing; supported: ByteLevel"},
    {"two_decoders",
     [](json& f) {
       f["decoder"] = sequence("decoders", {f["decoder"], f["decoder"]});
     },
     "decoder: want ByteLevel alone"},
    {"post_processor",
     [](json& f) {
       f["post_processor"] = {{"type", "BertProcessing"}};
     },
     "post_processor: the type \"BertProcessing\" is not supported; supported: ByteLevel, one "
     "TemplateProcessing, or none"},
    {"two_templates",
     [](json& f) {
       f["post_processor"] = sequence(
           "processors", {template_of(json::array({kText})), template_of(json::array({kText}))});
     },
     "post_processor.processors[1]: the type \"TemplateProcessing\" is not supported; supported: "
     "ByteLevel, one TemplateProcessing, or none"},
    {"truncation",
     [](json& f) {
       f["truncation"] = {{"max_length", 512}};
     },
     "truncation: is not supported; want null"},
    {"padding",
     [](json& f) {
       f["padding"] = {{"pad_id", 0}};
     },
     "padding: is not supported; want null"},
    // Options of BPE.
    {"byte_fallback", [](json& f) { f["model"]["byte_fallback"] = true; },
     "model: byte_fallback is not supported; want false"},
    {"dropout", [](json& f) { f["model"]["dropout"] = 0.1; },
     "model: dropout is for training and not supported; want null"},
    {"prefix", [](json& f) { f["model"]["continuing_subword_prefix"] = "##"; },
     "model.continuing_subword_prefix: \"##\" is not supported; want null"},
    {"suffix", [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; },
     "model.end_of_word_suffix: \"</w>\" is not supported; want null"},
    {"unknown_token", [](json& f) { f["model"]["unk_token"] = "<unk>"; },
     "model.unk_token: \"<unk>\" is not in the vocabulary"},
    // Missing keys and wrong types.
    {"no_model", [](json& f) { f.erase("model"); }, "\"model\" is missing"},
    {"no_vocab", [](json& f) { f["model"].erase("vocab"); }, "model: \"vocab\" is missing"},
    {"no_merges", [](json& f) { f["model"].erase("merges"); }, "model: \"merges\" is missing"},
    {"model_a_list",
     [](json& f) {
       f["model"] = {1, 2};
     },
     "model: want an object, got array"},
    {"vocab_a_list",
     [](json& f) {
       f["model"]["vocab"] = {1, 2};
     },
     "model.vocab: want an object, got array"},
    {"merges_an_object",
     [](json& f) {
       f["model"]["merges"] = {{"a", "b"}};
     },
     "model.merges: want an array, got object"},
    {"added_token_without_id",
     [](json& f) {
       f["added_tokens"] = json::array({{{"content", "x"}}});
     },
     "added_tokens[0]: \"id\" is missing"},
    {"flag_a_number", [](json& f) { f["pre_tokenizer"]["add_prefix_space"] = 1; },
     "pre_tokenizer.add_prefix_space: want true or false, got number"},
    {"type_a_number", [](json& f) { f["model"]["type"] = 5; },
     "model.type: want a string, got number"},
    {"no_type", [](json& f) { f["normalizer"] = json::object(); },
     "normalizer: \"type\" is missing"},
    // The vocabulary.
    {"empty_vocab", [](json& f) { f["model"]["vocab"] = json::object(); },
     "model.vocab: the vocabulary is empty"},
    {"negative_id", [](json& f) { f["model"]["vocab"]["ab"] = -1; },
     "model.vocab.\"ab\": got -1, want an id from 0 to 2055"},
    {"huge_id", [](json& f) { f["model"]["vocab"]["ab"] = 18446744073709551615u; },
     "model.vocab.\"ab\": got 18446744073709551615, want an id from 0 to 2055"},
    {"fractional_id", [](json& f) { f["model"]["vocab"]["ab"] = 256.5; },
     "model.vocab.\"ab\": want an integer, got number"},
    {"id_an_object",
     [](json& f) {
       f["model"]["vocab"]["ab"] = {{"id", 256}};
     },
     "model.vocab.\"ab\": want an integer, got null"},
    {"duplicate_id", [](json& f) { f["model"]["vocab"]["ab"] = 97; },
     "model.vocab: \"a\" and \"ab\" have the same id 97"},
    // Merges.
    {"merge_of_an_absent_token", [](json& f) { f["model"]["merges"][1] = "ab xyz"; },
     "model.merges[1]: \"xyz\" is not in the vocabulary"},
    {"merge_into_an_absent_token", [](json& f) { f["model"]["merges"][1] = "a c"; },
     "model.merges[1]: \"ac\" is not in the vocabulary"},
    {"merge_of_one", [](json& f) { f["model"]["merges"][1] = "ab"; },
     "model.merges[1]: want two tokens, \"left right\" or [\"left\", \"right\"]"},
    {"merge_of_three",
     [](json& f) {
       f["model"]["merges"][1] = {"a", "b", "c"};
     },
     "model.merges[1]: want two tokens, \"left right\" or [\"left\", \"right\"]"},
    {"merge_a_number", [](json& f) { f["model"]["merges"][1] = 7; },
     "model.merges[1]: want two tokens, \"left right\" or [\"left\", \"right\"]"},
    // Added tokens.
    {"added_token_with_a_gap",
     [](json& f) { f["added_tokens"] = json::array({added_token(300, "<x>")}); },
     "added_tokens[0]: \"<x>\" has id 300, want 258: the first id behind the vocabulary's"},
    {"added_token_of_another_id",
     [](json& f) { f["added_tokens"] = json::array({added_token(258, "ab")}); },
     "added_tokens[0]: \"ab\" has id 258, want 256: its id in the vocabulary"},
    {"added_token_twice",
     [](json& f) {
       f["added_tokens"] = {added_token(258, "<x>"), added_token(259, "<x>")};
     },
     "added_tokens[1]: \"<x>\" is in the list twice"},
    {"added_token_with_an_absurd_id",
     [](json& f) { f["added_tokens"] = json::array({added_token(1'000'000'000, "<x>")}); },
     "added_tokens[0].id: got 1000000000, want an id from 0 to 2059"},
    {"added_tokens_that_normalize_to_one",
     [](json& f) {
       f["normalizer"] = {{"type", "NFC"}};
       f["added_tokens"] = {added_token(258, "\u01d6"), added_token(259, "\u00fc\u0304")};
       for (json& token : f["added_tokens"]) token["normalized"] = true;
     },
     "added_tokens[1]: \"\u00fc\u0304\" is in the list twice"},
    // Splits.
    {"malformed_pattern",
     [](json& f) {
       f["pre_tokenizer"] = sequence("pretokenizers", {split("a("), f["pre_tokenizer"]});
     },
     "pre_tokenizer.pretokenizers[0].pattern: the regular expression \"a(\" is malformed at "
     "position 2: missing closing parenthesis"},
    {"unknown_behavior",
     [](json& f) {
       json part = split("a");
       part["behavior"] = "Sideways";
       f["pre_tokenizer"] = sequence("pretokenizers", {part, f["pre_tokenizer"]});
     },
     "pre_tokenizer.pretokenizers[0].behavior: \"Sideways\" is unknown; known: Isolated, Removed, "
     "Contiguous, MergedWithPrevious, MergedWithNext"},
    // Templates.
    {"template_without_text", [](json& f) { f["post_processor"] = template_of(json::array()); },
     "post_processor.single: the Sequence A is missing"},
    {"template_with_text_twice",
     [](json& f) {
       f["post_processor"] = template_of({kText, kText});
     },
     "post_processor.single[1].Sequence: want one Sequence, A"},
    {"template_of_an_absent_token",
     [](json& f) {
       f["post_processor"] = template_of({kBegin, kText});
     },
     "post_processor.special_tokens: \"begin\" is missing"},
    {"template_of_an_absurd_id",
     [](json& f) {
       f["post_processor"] =
           template_of({kBegin, kText}, {{"begin", {{"ids", json::array({300})}}}});
     },
     "post_processor.special_tokens.begin.ids[0]: got 300, want an id from 0 to 257"},
};

class BadTokenizerFile : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadTokenizerFile, IsRefusedWithTheReason) {
  json file = tiny_tokenizer_json();
  GetParam().spoil(file);
  EXPECT_EQ(error_of_text(file.dump()), std::string("t.json: ") + GetParam().message);
}

INSTANTIATE_TEST_SUITE_P(, BadTokenizerFile, ::testing::ValuesIn(kBadFiles),
                         [](const auto& row) { return row.param.name; });

TEST(TokenizerFile, TheTinyOneIsFine) {
  EXPECT_EQ(error_of_text(tiny_tokenizer_json().dump()), "nothing thrown");
}

TEST(TokenizerFile, TokenTwiceInTheVocabulary) {
  std::string text = tiny_tokenizer_json().dump();
  const std::string entry = "\"abc\":257";
  text.replace(text.find(entry), entry.size(), "\"abc\":257,\"abc\":258");
  EXPECT_EQ(error_of_text(text), "t.json: model.vocab: \"abc\" is in the vocabulary twice");
}

TEST(TokenizerFile, NotJson) {
  EXPECT_EQ(error_of_text(""),
            "t.json: not valid JSON: parse error at line 1, column 1: syntax error while parsing "
            "value - unexpected end of input; expected '[', '{', or a literal");
  EXPECT_EQ(error_of_text("{\"model\": \xFF}").substr(0, 24), "t.json: not valid JSON: ");
  EXPECT_EQ(error_of_text("[1e999]").substr(0, 24), "t.json: not valid JSON: ");
  EXPECT_EQ(error_of_text("[]"), "t.json: want an object, got array");
  EXPECT_EQ(error_of_text(std::string(100'000, '[')).substr(0, 24), "t.json: not valid JSON: ");
}

// Every beginning of a file, and every file with one byte changed, is loaded or refused.
TEST(TokenizerFile, DamageIsNeverACrash) {
  json file = tiny_tokenizer_json();
  file["normalizer"] = {{"type", "NFC"}};
  file["model"] = {{"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}}}, {"merges", json::array({"a b"})}};
  file["added_tokens"] = json::array({added_token(3, "<x>")});
  file["post_processor"] = template_of({kBegin, kText}, {{"begin", {{"ids", json::array({3})}}}});
  const std::string text = file.dump();
  ASSERT_EQ(error_of_text(text), "nothing thrown");
  for (size_t at = 0; at < text.size(); ++at) {
    std::string damaged = text;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (at % 7)));
    for (const std::string& candidate : {damaged, text.substr(0, at)}) {
      const std::string message = error_of_text(candidate);
      EXPECT_TRUE(message == "nothing thrown" || message.starts_with("t.json: ")) << message;
    }
  }
}

}  // namespace
}  // namespace mamba3
