#include <gtest/gtest.h>

#include <sstream>
#include <string>

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

TEST(Cli, UnknownCommandIsNamedWithTheNearestOne) {
  const ProgramResult result = run_program({"tokenise", "-q", "--temp=1"});
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.err,
            "mamba3: unknown command 'tokenise', did you mean tokenize? (see mamba3 --help)\n");
  EXPECT_EQ(run_program({"zzzzzzzz"}).err,
            "mamba3: unknown command 'zzzzzzzz' (see mamba3 --help)\n");
}

TEST(Cli, HintsOfACommandNameIt) {
  // The misspelt flag, not the required ones that are missing.
  EXPECT_EQ(run_program({"train", "--laeyrs", "4"}).err,
            "mamba3: unknown flag --laeyrs, did you mean --layers? (see mamba3 train --help)\n");
  EXPECT_EQ(run_program({"tokenize", "-q"}).err,
            "mamba3: unknown flag -q (see mamba3 tokenize --help)\n");
  EXPECT_EQ(run_program({"tokenize", "text"}).err,
            "mamba3: unexpected argument 'text' (see mamba3 tokenize --help)\n");
  EXPECT_EQ(run_program({"train", "--layers", "four", "-o", "x"}).exit_code, 2);
}

TEST(Cli, EveryCommandHasHelp) {
  const std::string help = run_program({"--help"}).out;
  const size_t list = help.find("Subcommands:\n");
  ASSERT_NE(list, std::string::npos) << help;
  std::istringstream lines(help.substr(help.find('\n', list) + 1));
  int commands = 0;
  for (std::string line, name; std::getline(lines, line) && line.starts_with("  ");) {
    if (line.starts_with("   ")) continue;  // the description goes on
    std::istringstream(line) >> name;
    const ProgramResult result = run_program({name, "--help"});
    EXPECT_EQ(result.exit_code, 0) << name;
    EXPECT_NE(result.out.find("Usage: mamba3 " + name), std::string::npos) << result.out;
    EXPECT_EQ(result.err, "") << name;
    ++commands;
  }
  EXPECT_GE(commands, 5);
}

TEST(Cli, ClosedPipeEndsItQuietly) {
  const ProgramResult result = testing::run_command(
      {"/bin/sh", "-c", "(trap '' PIPE; sleep 0.2; " MAMBA3_PROGRAM " --help) | true"});
  EXPECT_EQ(result.err, "");
}

TEST(Cli, ResultsThatCannotBeWrittenAreAFailure) {
  const ProgramResult result =
      testing::run_command({"/bin/sh", "-c", MAMBA3_PROGRAM " --help >/dev/full"});
  EXPECT_EQ(result.exit_code, 1);
  EXPECT_EQ(result.err, "mamba3: cannot write to standard output\n");
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
