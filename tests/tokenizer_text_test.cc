// The tokenizer's view of text: UTF-8, Unicode, the byte-level alphabet, regular expressions.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/errors.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"

namespace mamba3 {
namespace {

using testing::input_error_of;

TEST(Utf8, EveryCodePointComesBack) {
  for (char32_t c = 0; c <= 0x10FFFF; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    append_utf8(text, c);
    const Utf8Unit unit = utf8_at(text, 0);
    ASSERT_TRUE(unit.valid) << static_cast<uint32_t>(c);
    ASSERT_EQ(static_cast<uint32_t>(unit.code_point), static_cast<uint32_t>(c));
    ASSERT_EQ(static_cast<size_t>(unit.length), text.size());
  }
}

// The examples of the Unicode standard, tables 3-8 to 3-11, with one U+FFFD a maximal subpart.
TEST(Utf8, IllFormedSequencesAreReplacedAsUnicodeRecommends) {
  const std::string r = "\uFFFD";
  EXPECT_EQ(to_valid_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82"
                          "A"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(to_valid_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF"
                          "A"),
            r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(to_valid_utf8("\xF4\x91\x92\x93\xFF"
                          "A\x80\xBF"
                          "B"),
            r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(to_valid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
                          "A"),
            r + r + r + r + "A");
}

TEST(Utf8, FindsTheFirstIllFormedByte) {
  EXPECT_EQ(first_invalid_utf8("aé€😀"), std::nullopt);
  EXPECT_EQ(first_invalid_utf8("aé\xFF"), 3u);
  EXPECT_EQ(first_invalid_utf8("a\xE2\x82"), 1u);
}

TEST(ByteLevel, SpellsEveryByteWithOneCharacter) {
  std::string bytes, spelling;
  for (int byte = 0; byte < 256; ++byte) bytes.push_back(static_cast<char>(byte));
  spelling = byte_level_spelling(bytes);
  EXPECT_EQ(byte_level_bytes(spelling), bytes);
  EXPECT_EQ(byte_level_spelling(" a\n\xAD\xFF"), "ĠaĊŃÿ");
  for (const char* outside : {" ", "\n", "\u00ad", "\u0144", "\u00a0", "€", "\xFF"}) {
    EXPECT_EQ(byte_level_bytes(outside), std::nullopt) << outside;
  }
}

TEST(Unicode, TextForMatchingKeepsPositions) {
  std::string storage;
  const std::string plain = "abc é 日本";
  EXPECT_EQ(text_for_matching(plain, storage).data(), plain.data());
  // U+31350 is a letter since Unicode 15, U+180E is no space, U+1E6C0 is not assigned in
  // Unicode 16.
  const std::string text =
      "a\xFF\U00031350 \u180e\xE2\x82"
      "b\U0001E6C0";
  const std::string_view matched = text_for_matching(text, storage);
  EXPECT_EQ(matched,
            "a\x01\U00010000 \u0890\x01\x01"
            "b\U0010FFFF");
  EXPECT_EQ(matched.size(), text.size());
}

TEST(Unicode, NfcOfTheStandardsTraps) {
  EXPECT_EQ(nfc("plain"), "plain");
  EXPECT_EQ(nfc("e\u0301e"), "\u00e9e");
  EXPECT_EQ(nfc("q\u0307\u0323"), "q\u0323\u0307");  // reordered
  EXPECT_EQ(nfc("\u0958"), "\u0915\u093c");          // excluded from composition
  EXPECT_EQ(nfc("\u212b"), "\u00c5");                // singleton
  EXPECT_EQ(nfc("\u1100\u1161\u11a8"), "\uac01");    // Hangul
  EXPECT_EQ(nfc("\uac00\u11a7"), "\uac00\u11a7");    // not a final consonant
  EXPECT_EQ(nfc("a\u0301\xFF\u0301"), "\u00e1\xFF\u0301");
}

std::vector<std::string> matches(const std::string& pattern, const std::string& text) {
  const Regex regex(pattern);
  Regex::Search search(regex, text);
  std::vector<std::string> found;
  while (const auto match = search.next()) {
    found.push_back(text.substr(match->begin, match->end - match->begin));
  }
  return found;
}

using Strings = std::vector<std::string>;

TEST(Regex, KnowsUnicode) {
  EXPECT_EQ(matches(R"(\p{L}+|\p{N}{1,3})", "été1234x"), (Strings{"été", "123", "4", "x"}));
  EXPECT_EQ(matches(R"((?i:'s))", "'s'S'ſ's"), (Strings{"'s", "'S", "'ſ", "'s"}));
  EXPECT_EQ(matches(R"(\s+(?!\S))", "a  b\u00a0\u2003\u3000"),
            (Strings{" ", "\u00a0\u2003\u3000"}));
  EXPECT_EQ(matches("^.", "ab\ncd\n"), (Strings{"a", "c"}));
}

TEST(Regex, PassesOverEmptyMatchesBehindAMatch) {
  EXPECT_EQ(matches("b*", "abbc"), (Strings{"", "bb", ""}));
  EXPECT_EQ(matches("x*", "é"), (Strings{"", ""}));
}

TEST(Regex, RefusesWhatOnigurumaReadsDifferently) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"(\w+)", R"(\w)"},
      {R"(\bx)", R"(\b)"},
      {R"(a\h)", R"(\h)"},
      {R"(\p{Han})", R"(\p{Han})"},
      {R"(\p{Latin}+)", R"(\p{Latin})"},
      {R"(\pL)", R"(\pL)"},
      {"[[:alpha:]]", "["},
      {"[a-z&&[^b]]", "&&"},
      {"[]a]", "]"},
      {"(?m:.)", "(?m"},
      {"(?<name>a)", "(?<"},
      {"(*UTF)a", "(*U"},
      {"a{2}+", "{2}+"},
      {"a{2,3}?", "{2,3}?"},
      {"a{,3}", "{"},
      {R"((a)\1)", R"(\1)"},
      {R"(a\)", R"(\)"},
      {R"(\u0041)", R"(\u)"},
      {R"(\p{L)", R"(\p{L)"},
  };
  for (const auto& [pattern, part] : cases) {
    const std::string message = input_error_of([&, &p = pattern] { Regex regex(p); });
    EXPECT_NE(message.find(" uses " + part + ", which is not supported"), std::string::npos)
        << message;
  }
}

TEST(Regex, SaysWhereItIsMalformed) {
  EXPECT_EQ(
      input_error_of([] { Regex regex("a(b"); }),
      "the regular expression \"a(b\" is malformed at position 3: missing closing parenthesis");
}

TEST(Regex, GivesUpInsteadOfHanging) {
  const Regex regex(R"((?:a|a)*(?:a|a)*(?:a|a)*(?:a|a)*\d)");
  const std::string text(5000, 'a');
  Regex::Search search(regex, text);
  const std::string message = testing::error_of([&] { search.next(); });
  EXPECT_NE(message.find("fails on a text of 5000 bytes"), std::string::npos) << message;
}

}  // namespace
}  // namespace mamba3
