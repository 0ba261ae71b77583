#include <gtest/gtest.h>

#include <string>

#include "support/files.h"
#include "support/program.h"
#include "support/temp_folder.h"

namespace mamba3 {
namespace {

using testing::ProgramResult;
using testing::run_program;
using testing::TempFolder;
using testing::write_file;

const std::string kFile = MAMBA3_TEST_DATA "/tokenizers/llama3-style.json";

std::string config_of_vocab(int vocab) {
  return R"({"d_model": 32, "n_layer": 1, "d_intermediate": 0, "vocab_size": )" +
         std::to_string(vocab) +
         R"(, "ssm_cfg": {"layer": "Mamba3", "d_state": 16, "headdim": 16, "expand": 2}})";
}

TEST(TokenizeCommand, PrintsAJsonArray) {
  const ProgramResult bytes = run_program({"tokenize", "--tokenizer", "bytes"}, "Hi\n");
  EXPECT_EQ(bytes.out, "[72,105,10]\n");
  EXPECT_EQ(bytes.err, "");
  EXPECT_EQ(bytes.exit_code, 0);
  EXPECT_EQ(run_program({"tokenize", "--tokenizer", "bytes"}).out, "[]\n");
}

TEST(TokenizeCommand, SpecialAddsTheTemplate) {
  EXPECT_EQ(run_program({"tokenize", "--tokenizer", kFile, "--special"}, "").out, "[1208]\n");
  EXPECT_EQ(run_program({"tokenize", "--tokenizer", kFile}, "").out, "[]\n");
}

TEST(TokenizeCommand, AnyBytesComeBack) {
  std::string text = "A line.\r\n<|eot_id|> \xC3(\xFF";
  text.push_back('\0');
  const ProgramResult ids = run_program({"tokenize", "--tokenizer", kFile}, text);
  EXPECT_EQ(ids.err, "note: the text is not UTF-8 (byte 20); such bytes are encoded one by one\n");
  const ProgramResult back = run_program({"detokenize", "--tokenizer", kFile}, ids.out);
  EXPECT_EQ(back.out, text);
  EXPECT_EQ(back.exit_code, 0);
}

TEST(DetokenizeCommand, FlagsChangeTheText) {
  const std::string ids = "[1208, 65, 226, 1209]";
  const auto out = [&](const std::string& flag) {
    return run_program({"detokenize", "--tokenizer", kFile, flag}, ids).out;
  };
  EXPECT_EQ(out("--skip-special").find("<|"), std::string::npos);
  EXPECT_EQ(run_program({"detokenize", "--tokenizer", "bytes", "--valid-utf8"}, "[65,226,130]").out,
            "A\uFFFD");
  EXPECT_EQ(run_program({"detokenize", "--tokenizer", "bytes"}, "[65,226,130]").out, "A\xE2\x82");
}

TEST(DetokenizeCommand, BadIdsAreNamed) {
  const auto err = [](const std::string& input) {
    const ProgramResult result = run_program({"detokenize", "--tokenizer", "bytes"}, input);
    EXPECT_EQ(result.exit_code, 2);
    EXPECT_EQ(result.out, "");
    return result.err;
  };
  EXPECT_EQ(err("[1, 256]"), "mamba3: there is no token with id 256; ids are 0 to 255\n");
  EXPECT_EQ(err("[1, -2]"), "mamba3: item 1 on stdin is -2, not an id\n");
  EXPECT_EQ(err("[\"a\"]"), "mamba3: item 0 on stdin is \"a\", not an id\n");
  EXPECT_EQ(err("{}"), "mamba3: want a JSON array of ids on stdin, got object\n");
  EXPECT_EQ(err("1, 2").substr(0, 60),
            "mamba3: stdin is not a JSON array of ids, such as [1, 2, 3]:");
  EXPECT_EQ(err("").substr(0, 60), "mamba3: stdin is not a JSON array of ids, such as [1, 2, 3]:");
}

TEST(TokenizeCommand, TakesTheModelsTokenizer) {
  const TempFolder folder;
  std::filesystem::copy(kFile, folder / "tokenizer.json");
  EXPECT_EQ(run_program({"tokenize", "-m", folder.path(), "--special"}).out, "[1208]\n");
  EXPECT_EQ(run_program({"tokenize", "-m", folder.path(), "--tokenizer", "bytes"}, "A").out,
            "[65]\n");
}

TEST(TokenizeCommand, SmallModelsWithoutAFileHaveBytes) {
  const TempFolder folder;
  write_file(folder / "config.json", config_of_vocab(256));
  EXPECT_EQ(run_program({"tokenize", "-m", folder.path()}, "A").out, "[65]\n");
}

TEST(TokenizeCommand, LargeModelsWithoutAFileSayWhereToGetOne) {
  const TempFolder folder;
  write_file(folder / "config.json", config_of_vocab(128256));
  const ProgramResult result = run_program({"tokenize", "-m", folder.path()}, "A");
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(
      result.err,
      "mamba3: " + folder.path().string() +
          " has no tokenizer.json, and its vocabulary of 128256 ids is not that of raw bytes; "
          "put the tokenizer.json that the model was trained with into the folder, or name "
          "it with --tokenizer (the published Mamba-3 models use Llama-3.1's, which is "
          "distributed with that model)\n");
}

TEST(TokenizeCommand, WantsATokenizer) {
  const ProgramResult none = run_program({"tokenize"});
  EXPECT_EQ(none.exit_code, 2);
  EXPECT_EQ(none.err, "mamba3: no tokenizer: give -m DIR, --tokenizer FILE or --tokenizer bytes\n");
  const ProgramResult folder = run_program({"tokenize", "-m", "/nowhere"});
  EXPECT_EQ(folder.exit_code, 2);
  EXPECT_EQ(folder.err, "mamba3: -m /nowhere: there is no such folder\n");
}

}  // namespace
}  // namespace mamba3
