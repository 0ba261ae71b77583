#include "train/corpus.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"

namespace mamba3 {
namespace {

using testing::input_error_of;
using testing::TempFolder;
using testing::write_file;

std::string text_of(const std::vector<int32_t>& tokens) {
  return Tokenizer::bytes().decode(tokens);
}

TEST(Corpus, HoldsOutTheEndOfEachFile) {
  const TempFolder folder;
  write_file(folder / "a.txt", "0123456789");
  write_file(folder / "b.txt", "abcdefghij");
  const Corpus corpus = read_corpus({.text = {folder.path()}, .held_out = 0.2}, Tokenizer::bytes());
  EXPECT_EQ(text_of(corpus.train), "01234567abcdefgh");
  EXPECT_EQ(text_of(corpus.held_out), "89ij");
  EXPECT_EQ(corpus.documents, 2);
  EXPECT_EQ(corpus.bytes, 20);
}

TEST(Corpus, DoesNotSplitACharacter) {
  const TempFolder folder;
  write_file(folder / "a.txt",
             "aaa\xE2\x82\xAC"
             "aa");  // the middle falls within the euro sign
  const Corpus corpus =
      read_corpus({.text = {folder / "a.txt"}, .held_out = 0.5}, Tokenizer::bytes());
  EXPECT_EQ(text_of(corpus.train), "aaa\xE2\x82\xAC");
  EXPECT_EQ(text_of(corpus.held_out), "aa");
}

TEST(Corpus, ASeparateValidationTextLeavesTheRestWhole) {
  const TempFolder folder;
  write_file(folder / "a.txt", "0123456789");
  write_file(folder / "v.txt", "validate");
  const Corpus corpus =
      read_corpus({.text = {folder / "a.txt"}, .validation = folder / "v.txt", .held_out = 0.5},
                  Tokenizer::bytes());
  EXPECT_EQ(text_of(corpus.train), "0123456789");
  EXPECT_EQ(text_of(corpus.held_out), "validate");
}

TEST(Corpus, FoldersAreReadInOrderWithoutWhatIsNoText) {
  const TempFolder folder;
  std::filesystem::create_directory(folder / "b");
  std::filesystem::create_directory(folder / ".git");
  write_file(folder / "b/two", "2");
  write_file(folder / "a", "1");
  write_file(folder / "c.dat", std::string("x\0y", 3));
  write_file(folder / ".hidden", "h");
  write_file(folder / ".git/config", "g");
  std::filesystem::create_symlink("a", folder / "link");
  const Corpus corpus =
      read_corpus({.text = {folder.path(), folder / "a"}, .held_out = 0}, Tokenizer::bytes());
  EXPECT_EQ(text_of(corpus.train), "12");
  ASSERT_EQ(corpus.warnings.size(), 1u);
  EXPECT_EQ(corpus.warnings[0], "left out " + (folder / "c.dat").string() + ": not a text");
}

TEST(Corpus, AFileNamedOutrightMayHoldAnything) {
  const TempFolder folder;
  write_file(folder / "binary", std::string("x\0y", 3));
  const Corpus corpus =
      read_corpus({.text = {folder / "binary"}, .held_out = 0}, Tokenizer::bytes());
  EXPECT_EQ(corpus.train, (std::vector<int32_t>{'x', 0, 'y'}));
}

TEST(Corpus, FingerprintSeesEveryTokenAndTheSplit) {
  const Corpus corpus{.train = {1, 2, 3}, .held_out = {4}, .warnings = {}};
  Corpus other = corpus;
  EXPECT_EQ(corpus.fingerprint(), other.fingerprint());
  other.held_out[0] = 5;
  EXPECT_NE(corpus.fingerprint(), other.fingerprint());
  EXPECT_NE(corpus.fingerprint(),
            (Corpus{.train = {1, 2}, .held_out = {3, 4}, .warnings = {}}).fingerprint());
}

TEST(Corpus, SaysWhatIsWrongWithAPath) {
  const TempFolder folder;
  write_file(folder / "empty", "");
  std::filesystem::create_directory(folder / "bare");
  const auto problem = [&](std::string_view name) {
    return input_error_of([&] { read_corpus({.text = {folder / name}}, Tokenizer::bytes()); });
  };
  EXPECT_EQ(problem("absent"), "no such file or folder: " + (folder / "absent").string());
  EXPECT_EQ(problem("empty"),
            "there is no text to train on: " + (folder / "empty").string() + " is empty");
  EXPECT_EQ(problem("bare"),
            "there is no text to train on: " + (folder / "bare").string() + " has no text files");
}

}  // namespace
}  // namespace mamba3
