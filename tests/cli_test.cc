#include <gtest/gtest.h>

#include "cli/nearest.h"
#include "support/program.h"

namespace mamba3 {
namespace {

using testing::ProgramResult;
using testing::run_program;

TEST(Cli, HelpNamesTheProgramAndTheExitCodes) {
  const ProgramResult result = run_program({"--help"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_NE(result.out.find("Mamba-3"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("Exit codes"), std::string::npos) << result.out;
  EXPECT_EQ(result.err, "");
}

TEST(Cli, VersionGoesToStdout) {
  const ProgramResult result = run_program({"--version"});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_EQ(result.out.substr(0, 7), "mamba3 ");
  EXPECT_EQ(result.err, "");
}

TEST(Cli, WithoutACommandSaysWhereTheyAreListed) {
  const ProgramResult result = run_program({});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(result.err, "mamba3: no command (see mamba3 --help)\n");
}

TEST(Cli, UnknownFlagIsNamedWithTheNearestOne) {
  const ProgramResult result = run_program({"--vesrion"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.err,
            "mamba3: unknown flag --vesrion, did you mean --version? (see mamba3 --help)\n");
}

TEST(Cli, UnknownFlagsValueIsNotPartOfItsName) {
  const ProgramResult result = run_program({"--colour=blue"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.err, "mamba3: unknown flag --colour (see mamba3 --help)\n");
}

TEST(Cli, UnknownCommandIsNamed) {
  const ProgramResult result = run_program({"zzzzzzzz"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.err.substr(0, 8), "mamba3: ");
  EXPECT_NE(result.err.find("'zzzzzzzz'"), std::string::npos) << result.err;
}

TEST(Nearest, FindsAMisspeltWordAndNothingFarAway) {
  const std::vector<std::string> commands = {"generate", "info", "tokenize", "detokenize"};
  EXPECT_EQ(cli::nearest("genarate", commands), "generate");
  EXPECT_EQ(cli::nearest("ifno", commands), "info");  // neighbours exchanged: one change
  EXPECT_EQ(cli::nearest("tokenise", commands), "tokenize");
  EXPECT_EQ(cli::nearest("serve", commands), "");
  EXPECT_EQ(cli::nearest("", commands), "");
  EXPECT_EQ(cli::nearest("info", {}), "");
}

}  // namespace
}  // namespace mamba3
