#include "formats/zip.h"

#include <gtest/gtest.h>

#include <cstring>

#include "support/archives.h"
#include "support/errors.h"
#include "support/files.h"

namespace mamba3 {
namespace {

using testing::bytes_of;
using testing::input_error_of;
using testing::raw;
using testing::zip_of;
using testing::ZipPart;

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Reads the directory and all entries.
std::string error_reading(const std::string& file) {
  return input_error_of([&] {
    const ZipArchive archive(bytes_of(file), "zip");
    for (const ZipEntry& entry : archive.entries()) archive.read(entry);
  });
}

// The file with some bytes replaced, `from` counted from the end if negative.
template <typename T>
std::string with(std::string file, int64_t from, T value) {
  const size_t at = from < 0 ? file.size() - static_cast<size_t>(-from) : static_cast<size_t>(from);
  std::memcpy(file.data() + at, &value, sizeof(T));
  return file;
}

constexpr int64_t kEnd = -22;              // of the end record
constexpr int64_t kEntry = kEnd - 46 - 4;  // of the directory's last entry, named "name"
const std::string kText(1000, 'z');

std::string one_entry(bool deflate = false) {
  return zip_of({{"name", kText, deflate}});
}

TEST(Zip, ReadsStoredEntriesInPlace) {
  const std::string file = zip_of({{"b", "second"}, {"a", "first"}, {"empty", ""}});
  const ZipArchive archive(bytes_of(file), "zip");
  ASSERT_EQ(archive.entries().size(), 3u);
  const ZipEntry* a = archive.find("a");
  ASSERT_NE(a, nullptr);
  const ZipContent content = archive.read(*a);
  EXPECT_EQ(text_of(content.bytes), "first");
  EXPECT_EQ(content.owner, nullptr);
  EXPECT_GE(reinterpret_cast<const char*>(content.bytes.data()), file.data());
  EXPECT_LT(reinterpret_cast<const char*>(content.bytes.data()), file.data() + file.size());
  EXPECT_EQ(text_of(archive.read(*archive.find("b")).bytes), "second");
  EXPECT_EQ(text_of(archive.read(*archive.find("empty")).bytes), "");
  EXPECT_EQ(archive.find("c"), nullptr);
}

TEST(Zip, UnpacksDeflatedEntries) {
  const std::string file = zip_of({{"a", kText, true}, {"empty", "", true}, {"b", "stored"}});
  EXPECT_LT(file.size(), 500u);
  ZipContent content;
  {
    const ZipArchive archive(bytes_of(file), "zip");
    content = archive.read(*archive.find("a"));
    EXPECT_EQ(text_of(archive.read(*archive.find("empty")).bytes), "");
  }
  EXPECT_EQ(text_of(content.bytes), kText);
}

TEST(Zip, Reads64BitDirectories) {
  const std::string file = zip_of({{"a", "first"}, {"b", kText, true}}, true);
  const ZipArchive archive(bytes_of(file), "zip");
  EXPECT_EQ(text_of(archive.read(*archive.find("a")).bytes), "first");
  EXPECT_EQ(text_of(archive.read(*archive.find("b")).bytes), kText);
}

TEST(Zip, AllowsACommentAtTheEnd) {
  const std::string file = with(one_entry(), -2, uint16_t{7}) + "comment";
  EXPECT_EQ(error_reading(file), "nothing thrown");
}

TEST(Zip, EveryTruncationIsAnError) {
  for (const bool zip64 : {false, true}) {
    const std::string file = zip_of({{"a", "first"}, {"b", kText, true}}, zip64);
    for (size_t size = 0; size < file.size(); ++size) {
      EXPECT_EQ(error_reading(file.substr(0, size)),
                "zip: no end of a zip archive: the file is truncated, or is no zip archive")
          << size;
    }
  }
}

// No damage may crash the reader; most of it must show.
TEST(Zip, SurvivesAnyDamagedByte) {
  for (const bool zip64 : {false, true}) {
    const std::string file = zip_of({{"a", "first"}, {"b", kText, true}}, zip64);
    for (size_t at = 0; at < file.size(); ++at) {
      for (const uint8_t flip : {0x01, 0x80, 0xff}) {
        std::string damaged = file;
        damaged[at] = static_cast<char>(damaged[at] ^ flip);
        const std::string error = error_reading(damaged);
        EXPECT_TRUE(error == "nothing thrown" || error.starts_with("zip: ")) << error;
      }
    }
  }
}

TEST(Zip, ChecksumsShowDamage) {
  for (const bool deflate : {false, true}) {
    const std::string file = with(one_entry(deflate), kEntry + 16, uint32_t{1});
    EXPECT_EQ(error_reading(file),
              "zip: the checksum of \"name\" does not match: the file is damaged (or was written "
              "by torch with checksums switched off: save it again with them)");
  }
  std::string flipped = one_entry();
  flipped[100] = 'y';
  EXPECT_NE(error_reading(flipped).find("checksum"), std::string::npos);
}

TEST(Zip, RefusesDamagedDirectories) {
  EXPECT_EQ(error_reading(with(one_entry(), kEnd + 16, uint32_t{5000})),
            "zip: the zip directory does not fit into the file: the file is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEnd + 10, uint16_t{2})),
            "zip: the zip directory does not fit into the file: the file is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry, uint32_t{0})),
            "zip: the zip directory is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 28, uint16_t{5})),
            "zip: the zip directory is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 42, uint32_t{1})),
            "zip: \"name\" is not where the zip directory says: the file is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 42, uint32_t{0xfffffffe})),
            "zip: \"name\" is not where the zip directory says: the file is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 42, uint32_t{0xffffffff})),
            "zip: \"name\" lacks its zip64 sizes");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 24, uint32_t{1001})),
            "zip: the sizes of \"name\" disagree");
  EXPECT_EQ(error_reading(
                with(with(one_entry(), kEntry + 24, uint32_t{5000}), kEntry + 20, uint32_t{5000})),
            "zip: \"name\" does not fit into the file: the file is damaged");
  EXPECT_EQ(error_reading(with(one_entry(), 30, 'g')),
            "zip: \"game\" has another name in the zip directory: \"name\"");
  EXPECT_EQ(error_reading(with(one_entry(), kEnd + 4, uint16_t{1})),
            "zip: zip archives of several volumes are not supported");
  const std::string zip64 = zip_of({{"a", "first"}}, true);
  EXPECT_EQ(error_reading(with(zip64, kEnd - 20 + 8, uint64_t{0})),
            "zip: the zip64 end record is not where it should be: the file is damaged");
  EXPECT_EQ(error_reading(with(zip64, kEnd - 20 + 8, ~uint64_t{0})),
            "zip: the zip64 end record is not where it should be: the file is damaged");
}

TEST(Zip, RefusesWhatItDoesNotSupport) {
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 8, uint16_t{1})),
            "zip: \"name\" is encrypted");
  EXPECT_EQ(error_reading(with(one_entry(), kEntry + 10, uint16_t{12})),
            "zip: \"name\" is packed with method 12: only stored and deflated entries are "
            "supported");
}

TEST(Zip, RefusesTwoEntriesOfOneName) {
  EXPECT_EQ(error_reading(zip_of({{"a", "1"}, {"a", "2"}})), "zip: there are two entries \"a\"");
}

TEST(Zip, RefusesOverlappingEntries) {
  // The second entry of the directory points into the data of the first, which hold a local header.
  const std::string inner = zip_of({{"b", "shared"}});
  const std::string file = zip_of({{"a", inner}, {"b", "shared"}});
  const auto offset = static_cast<uint32_t>(30 + 1);  // behind the local header of "a"
  EXPECT_EQ(error_reading(with(file, kEnd - 47 + 42, offset)), "zip: \"b\" overlaps \"a\"");
}

TEST(Zip, RefusesBombs) {
  const std::string zeros(20 << 20, '\0');
  const std::string error = error_reading(zip_of({{"a", zeros, true}}));
  EXPECT_NE(error.find("16 times its size: a zip bomb?"), std::string::npos) << error;
  // Many small ones too.
  const std::string part(3 << 20, '\0');
  std::vector<ZipPart> parts;
  for (int i = 0; i < 6; ++i) parts.push_back({std::to_string(i), part, true});
  EXPECT_NE(error_reading(zip_of(parts)).find("a zip bomb?"), std::string::npos);
}

TEST(Zip, UnpacksNoMoreThanDeclared) {
  for (const uint32_t declared : {999u, 1001u, 0u}) {
    EXPECT_EQ(error_reading(with(one_entry(true), kEntry + 24, declared)),
              "zip: \"name\" cannot be unpacked: the file is damaged");
  }
  std::string damaged = one_entry(true);
  damaged[34] = '\xff';
  EXPECT_EQ(error_reading(damaged), "zip: \"name\" cannot be unpacked: the file is damaged");
}

}  // namespace
}  // namespace mamba3
