#include "mamba3/tokenizer.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "support/errors.h"
#include "support/files.h"
#include "support/random.h"
#include "support/temp_folder.h"
#include "support/tiny_tokenizer.h"
#include "tokenizer/utf8.h"

namespace mamba3 {
namespace {

using nlohmann::json;
using testing::added_token;
using testing::input_error_of;
using testing::Random;
using testing::tiny_tokenizer;
using Ids = std::vector<int32_t>;

std::string all_bytes() {
  std::string text;
  for (int byte = 0; byte < 256; ++byte) text.push_back(static_cast<char>(byte));
  return text;
}

Tokenizer llama3_style() {
  return Tokenizer::from_file(MAMBA3_TEST_DATA "/tokenizers/llama3-style.json");
}

TEST(Tokenizer, BytesAreTheirOwnIds) {
  const Tokenizer bytes = Tokenizer::bytes();
  EXPECT_EQ(bytes.vocab_size(), 256);
  EXPECT_EQ(bytes.encode("A\n\xFF", true), (Ids{65, 10, 255}));
  EXPECT_EQ(bytes.decode(bytes.encode(all_bytes())), all_bytes());
  EXPECT_EQ(bytes.token(32), "Ġ");
  EXPECT_EQ(bytes.id("Ġ"), 32);
  EXPECT_FALSE(bytes.bos());
  EXPECT_TRUE(bytes.eos().empty());
  EXPECT_EQ(bytes.description(), "raw bytes, 256 tokens");
}

TEST(Tokenizer, IdsWithoutATokenAreErrors) {
  const Tokenizer bytes = Tokenizer::bytes();
  for (const int32_t id : {-1, 256, INT32_MAX}) {
    EXPECT_EQ(input_error_of([&] {
                bytes.decode(Ids{65, id});
              }),
              fmt::format("there is no token with id {}; ids are 0 to 255", id));
    EXPECT_FALSE(bytes.token(id));
    EXPECT_FALSE(bytes.is_special(id));
  }
}

TEST(Tokenizer, MergesTheLowestRankFirst) {
  EXPECT_EQ(tiny_tokenizer().encode("abcab aab"), (Ids{257, 256, 32, 97, 256}));
}

TEST(Tokenizer, LooksUpTokens) {
  const Tokenizer t = llama3_style();
  const int32_t begin = 1208;
  EXPECT_EQ(t.token(begin), "<|begin_of_text|>");
  EXPECT_EQ(t.id("<|begin_of_text|>"), begin);
  EXPECT_EQ(t.id("no such token"), std::nullopt);
  EXPECT_TRUE(t.is_special(begin));
  EXPECT_FALSE(t.is_special(begin - 1));
  EXPECT_EQ(t.bos(), begin);
  EXPECT_EQ(t.eos(), (Ids{begin + 1}));
  EXPECT_EQ(t.vocab_size(), begin + 7);
  EXPECT_EQ(t.description(), "byte-level BPE, 1215 tokens");
}

TEST(Tokenizer, AddSpecialPutsTheTemplateAround) {
  const Tokenizer t = llama3_style();
  Ids want = t.encode("Hello");
  want.insert(want.begin(), *t.bos());
  EXPECT_EQ(t.encode("Hello", true), want);
  EXPECT_EQ(t.encode("", true), (Ids{*t.bos()}));
  EXPECT_EQ(t.decode(want), "<|begin_of_text|>Hello");
  EXPECT_EQ(t.decode(want, true), "Hello");
}

TEST(Tokenizer, AnyBytesComeBackAsTheyWere) {
  Random random(11);
  const Tokenizer t = llama3_style();
  for (int round = 0; round < 200; ++round) {
    std::string text = all_bytes();
    for (char& c : text) {
      // Half of it ASCII, so that words, spaces and broken characters meet.
      c = static_cast<char>(random.integer(0, 2) ? random.integer(0, 256) : random.integer(9, 127));
    }
    EXPECT_EQ(t.decode(t.encode(text)), text);
  }
}

// A byte that is no character is a symbol like "!": it ends a word, and takes the space before it.
TEST(Tokenizer, InvalidUtf8IsASymbolByItself) {
  const json nfc = {{"normalizer", {{"type", "NFC"}}}};
  for (const Tokenizer& t : {tiny_tokenizer(), tiny_tokenizer(nfc)}) {
    EXPECT_EQ(t.encode("ab\xFF\xFE"), (Ids{256, 255, 254}));
    EXPECT_EQ(t.encode("abc\xE2\x82 abc\xC3"), (Ids{257, 0xE2, 0x82, 32, 257, 0xC3}));
    EXPECT_EQ(t.encode("a\xED\xA0\x80"), (Ids{97, 0xED, 0xA0, 0x80}));  // a surrogate
  }
  const Tokenizer t = tiny_tokenizer(
      {{"model", {{"vocab", {{"Ġÿ", 258}, {"ÿa", 259}}}, {"merges", {"a b", "Ġ ÿ", "ÿ a"}}}}});
  EXPECT_EQ(t.encode(" \xFF"
                     "ab"),
            (Ids{258, 256}));
}

TEST(Tokenizer, NfcComposesAroundInvalidUtf8) {
  const Tokenizer t = tiny_tokenizer({{"normalizer", {{"type", "NFC"}}}});
  EXPECT_EQ(t.decode(t.encode("e\u0301\xFF\u0301"
                              "e\u0301")),
            "\u00e9\xFF\u0301\u00e9");
}

TEST(Tokenizer, TakesTheLongestAddedToken) {
  const Tokenizer t = tiny_tokenizer(
      {{"added_tokens",
        {added_token(258, "<a>"), added_token(259, "<a><b>"), added_token(260, "a>")}}});
  EXPECT_EQ(t.encode("<a><b><a>a><a><a><b"), (Ids{259, 258, 260, 258, 258, '<', 'b'}));
}

TEST(Tokenizer, ConfigBesideTheFileNamesTheBoundaries) {
  const testing::TempFolder folder;
  json file = testing::tiny_tokenizer_json();
  file["added_tokens"] = {added_token(258, "<|endoftext|>", true), added_token(259, "<turn>", true),
                          added_token(260, "<s>", true)};
  testing::write_file(folder / "tokenizer.json", file.dump());
  EXPECT_EQ(Tokenizer::find_in(folder.path())->eos(), (Ids{258}));
  EXPECT_EQ(Tokenizer::find_in(folder.path())->bos(), std::nullopt);

  testing::write_file(folder / "tokenizer_config.json",
                      R"({"eos_token": {"content": "<turn>"}, "bos_token": "<s>"})");
  const auto tokenizer = Tokenizer::find_in(folder.path());
  ASSERT_TRUE(tokenizer);
  EXPECT_EQ(tokenizer->eos(), (Ids{259, 258}));
  EXPECT_EQ(tokenizer->bos(), 260);

  testing::write_file(folder / "tokenizer_config.json", R"({"eos_token": 5})");
  EXPECT_EQ(
      input_error_of([&] { Tokenizer::find_in(folder.path()); }),
      (folder / "tokenizer_config.json").string() + ": eos_token: want an object, got number");
}

TEST(Tokenizer, FolderWithoutAFileHasNone) {
  const testing::TempFolder folder;
  EXPECT_FALSE(Tokenizer::find_in(folder.path()));
}

TEST(Tokenizer, MissingFileIsNamed) {
  EXPECT_EQ(input_error_of([] { Tokenizer::from_file("/nowhere/tokenizer.json"); }),
            "cannot read /nowhere/tokenizer.json: No such file or directory");
}

// Quadratic work would take minutes.
TEST(Tokenizer, LongWordsAndRunsAreNoTrap) {
  const json added = added_token(258, "\t", false);
  json strips = {{"added_tokens", json::array({added})}, {"normalizer", {{"type", "NFC"}}}};
  strips["added_tokens"][0]["lstrip"] = strips["added_tokens"][0]["rstrip"] = true;
  std::string marks = "a";
  for (int i = 0; i < 300'000; ++i) marks += "\u0301\u0334";
  const std::vector<std::string> texts = {
      std::string(1'000'000, 'a'),   std::string(1'000'000, ' '),  std::string(1'000'000, '\n'),
      std::string(300'000, '\t'),    std::string(1'000'000, '\''), marks,
      std::string(1'000'000, '\xE2')};
  const auto begin = std::chrono::steady_clock::now();
  for (const Tokenizer& t : {llama3_style(), tiny_tokenizer(strips)}) {
    for (const std::string& text : texts) EXPECT_FALSE(t.encode(text).empty());
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(took.count(), 60);
}

TEST(Tokenizer, ThreadsMayShareOne) {
  const Tokenizer t = llama3_style();
  const std::string text = "It is a truth universally acknowledged, é 123 \xFF";
  const Ids want = t.encode(text);
  std::vector<Ids> got(4);
  std::vector<std::thread> threads;
  for (Ids& ids : got) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) ids = t.encode(text);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Ids& ids : got) EXPECT_EQ(ids, want);
}

TEST(StreamDecoder, HoldsBackUntilACharacterIsWhole) {
  StreamDecoder decoder(Tokenizer::bytes());
  EXPECT_EQ(decoder.push('a'), "a");
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push(0x82), "");
  EXPECT_EQ(decoder.push(0xAC), "€");
  EXPECT_EQ(decoder.flush(), "");
}

TEST(StreamDecoder, ReplacesWhatCannotBecomeACharacter) {
  StreamDecoder decoder(Tokenizer::bytes());
  EXPECT_EQ(decoder.push(0xE2), "");
  EXPECT_EQ(decoder.push('a'), "\uFFFDa");
  EXPECT_EQ(decoder.push(0xFF), "\uFFFD");
  EXPECT_EQ(decoder.push(0xF0), "");
  EXPECT_EQ(decoder.push(0x9F), "");
  EXPECT_EQ(decoder.flush(), "\uFFFD");
  EXPECT_EQ(decoder.push('b'), "b");  // another text
}

TEST(StreamDecoder, PiecesJoinToTheWhole) {
  Random random(12);
  const Tokenizer t = llama3_style();
  for (int round = 0; round < 200; ++round) {
    Ids ids(40);
    for (int32_t& id : ids) {
      id = static_cast<int32_t>(random.integer(0, random.integer(0, 2) ? 256 : t.vocab_size()));
    }
    for (const bool skip_special : {false, true}) {
      StreamDecoder decoder(t, skip_special);
      std::string text;
      for (const int32_t id : ids) {
        const std::string piece = decoder.push(id);
        EXPECT_EQ(first_invalid_utf8(piece), std::nullopt);
        text += piece;
      }
      EXPECT_EQ(text + decoder.flush(), to_valid_utf8(t.decode(ids, skip_special)));
    }
  }
}

TEST(StreamDecoder, RefusesIdsWithoutAToken) {
  StreamDecoder decoder(Tokenizer::bytes());
  EXPECT_EQ(input_error_of([&] { decoder.push(256); }),
            "there is no token with id 256; ids are 0 to 255");
}

}  // namespace
}  // namespace mamba3
