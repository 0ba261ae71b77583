// The ids of the `tokenizers` package, as dev/tokenizer_oracle.py wrote them down.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "mamba3/tokenizer.h"
#include "support/files.h"
#include "tokenizer/utf8.h"

namespace mamba3 {
namespace {

using nlohmann::json;
using testing::read_file;
using Ids = std::vector<int32_t>;
using Checksum = std::pair<size_t, uint32_t>;  // number of ids, CRC-32

const std::filesystem::path kData = std::filesystem::path(MAMBA3_TEST_DATA) / "tokenizers";
const std::filesystem::path kShared = std::filesystem::path(MAMBA3_SHARED) / "data";

const json& goldens() {
  static const json file = json::parse(read_file(kData / "goldens.json"));
  return file;
}

Checksum checksum(const Ids& ids) {
  const auto* bytes = reinterpret_cast<const Bytef*>(ids.data());
  const auto size = static_cast<uInt>(ids.size() * sizeof(int32_t));
  return {ids.size(), static_cast<uint32_t>(crc32(crc32(0, nullptr, 0), bytes, size))};
}

// Each of 4096 code points in many places: beside letters, digits, spaces, quotes, marks, itself.
std::string text_of_block(char32_t first) {
  std::string text;
  for (char32_t c = first; c < first + 4096; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    for (const std::string before : {"a", "1 ", " ", "", "'", "e\u0301\u0334"}) {
      text += before;
      append_utf8(text, c);
    }
    text += "\u11a8\n";
  }
  return text;
}

void expect_blocks(const Tokenizer& tokenizer, const json& want) {
  for (const json& block : want) {
    const auto first = block[0].get<uint32_t>();
    const Ids ids = tokenizer.encode(text_of_block(first), true);
    EXPECT_EQ(checksum(ids).second, block[1])
        << fmt::format("a character of U+{:04X} and the 4095 behind it", first);
  }
}

void expect_ids(const Tokenizer& tokenizer, const json& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    const auto text = goldens()["texts"][i].get<std::string>();
    EXPECT_EQ(tokenizer.encode(text, true), want[i].get<Ids>()) << "text " << i << ": " << text;
  }
}

void expect_checksums(const Tokenizer& tokenizer, const json& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    const auto text = goldens()["texts"][i].get<std::string>();
    const Ids ids = tokenizer.encode(text, true);
    EXPECT_EQ(checksum(ids), want[i].get<Checksum>()) << "text " << i << ": " << text << "\n"
                                                      << ::testing::PrintToString(ids);
  }
}

class TokenizerVariant : public ::testing::TestWithParam<size_t> {};

TEST_P(TokenizerVariant, GivesTheIdsOfTheReference) {
  const json& variant = goldens()["variants"][GetParam()];
  json file = json::parse(read_file(kData / "llama3-style.json"));
  file.merge_patch(variant["patch"]);
  const auto tokenizer = Tokenizer::from_json(file.dump(), variant["name"].get<std::string>());
  if (variant.contains("ids")) expect_ids(tokenizer, variant["ids"]);
  if (variant.contains("checksums")) expect_checksums(tokenizer, variant["checksums"]);
  if (variant.contains("blocks")) expect_blocks(tokenizer, variant["blocks"]);
}

std::string name_of_variant(const ::testing::TestParamInfo<size_t>& info) {
  auto name = goldens()["variants"][info.param]["name"].get<std::string>();
  std::replace(name.begin(), name.end(), ' ', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Golden, TokenizerVariant,
                         ::testing::Range(size_t{0}, goldens()["variants"].size()),
                         name_of_variant);

TEST(TokenizerGolden, MergesMayBeStrings) {
  json file = json::parse(read_file(kData / "llama3-style.json"));
  for (json& merge : file["model"]["merges"]) {
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  expect_ids(Tokenizer::from_json(file.dump(), "strings"), goldens()["variants"][0]["ids"]);
}

// The two shared tokenizers, whose files are too large to be here.
class SharedTokenizer : public ::testing::TestWithParam<size_t> {
 protected:
  void SetUp() override {
    const auto file = kShared / "tokenizers" / golden()["file"].get<std::string>();
    if (!std::filesystem::exists(file)) GTEST_SKIP() << "needs " << file;
    tokenizer_ = Tokenizer::from_file(file);
  }
  const json& golden() const { return goldens()["shared"][GetParam()]; }

  Tokenizer tokenizer_ = Tokenizer::bytes();
};

TEST_P(SharedTokenizer, GivesTheIdsOfTheReference) {
  expect_ids(tokenizer_, golden()["ids"]);
}

TEST_P(SharedTokenizer, AgreesOnBooks) {
  for (const auto& [name, want] : golden()["books"].items()) {
    const std::string text = read_file(kShared / "text" / name);
    const Ids ids = tokenizer_.encode(text);
    EXPECT_EQ(checksum(ids), want.get<Checksum>()) << name;
    EXPECT_EQ(tokenizer_.decode(ids), text) << name;
  }
}

TEST_P(SharedTokenizer, DecodesAnyIdsAsTheReference) {
  for (const json& pair : golden()["decoded"]) {
    const Ids ids = pair[0].get<Ids>();
    EXPECT_EQ(to_valid_utf8(tokenizer_.decode(ids)), pair[1].get<std::string>())
        << ::testing::PrintToString(ids);
  }
}

std::string name_of_shared(const ::testing::TestParamInfo<size_t>& info) {
  auto name = goldens()["shared"][info.param]["file"].get<std::string>();
  std::replace_if(
      name.begin(), name.end(), [](char c) { return !std::isalnum(c); }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Golden, SharedTokenizer,
                         ::testing::Range(size_t{0}, goldens()["shared"].size()), name_of_shared);

}  // namespace
}  // namespace mamba3
