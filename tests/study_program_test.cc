#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "support/files.h"
#include "support/program.h"
#include "support/temp_folder.h"

namespace mamba3 {
namespace {

using testing::ProgramResult;
using testing::read_file;
using testing::run_program;
using testing::TempFolder;

class StudyProgram : public ::testing::Test {
 protected:
  // A few updates of small models.
  std::vector<std::string> study(std::string_view folder, std::vector<std::string> more) const {
    std::vector<std::string> args = {
        "study", "state-tracking", "--reduced", "--device", "cpu",           "--threads",
        "1",     "--batch",        "2",         "-o",       folder_ / folder};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }
  nlohmann::json results(std::string_view folder) const {
    return nlohmann::json::parse(read_file(folder_ / folder / "results.json"));
  }

  TempFolder folder_;
};

TEST_F(StudyProgram, TrainsEverySystemAndItsCommandsRepeatThem) {
  const ProgramResult result =
      run_program(study("study", {"--task", "parity", "--steps", "3", "--seeds", "1"}));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_NE(result.out.find("6 of 6 runs are finished"), std::string::npos) << result.out;
  EXPECT_NE(result.out.find("| Gated DeltaNet [-1, 1] | 100.00 |"), std::string::npos);
  EXPECT_EQ(result.out, read_file(folder_ / "study/results.md"));
  EXPECT_NE(result.err.find("parity/mamba2/"), std::string::npos) << result.err;
  const nlohmann::json json = results("study");
  ASSERT_EQ(json["cells"].size(), 6u);
  for (const size_t i : {size_t{2}, size_t{5}}) {
    const auto& cell = json["cells"][i];
    std::istringstream words(cell["command"].get<std::string>());
    std::string word;
    words >> word;
    EXPECT_EQ(word, "mamba3");
    std::vector<std::string> args;
    while (words >> word) args.push_back(word);
    const std::string again = folder_ / std::to_string(i);
    args.insert(args.end(), {"-o", again});
    const ProgramResult repeated = run_program(args);
    ASSERT_EQ(repeated.exit_code, 0) << repeated.err;
    EXPECT_EQ(
        read_file(again + "/model.safetensors"),
        read_file(folder_ / "study/cells" / cell["name"].get<std::string>() / "model.safetensors"));
  }
}

TEST_F(StudyProgram, InterruptSavesAndTheSameCommandContinues) {
  const std::vector<std::string> flags = {"--task",  "parity", "--system", "mamba3,mamba3_no_rope",
                                          "--steps", "300",    "--seeds",  "1",
                                          "--lr",    "0.004"};
  const auto metrics = folder_ / "study/cells/parity/mamba3/d32-lr0.004-seed0/metrics.jsonl";
  const ProgramResult cut = run_program(study("study", flags), {}, [&](pid_t child) {
    for (int i = 0; i < 2000 && read_file(metrics).size() < 500; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    kill(child, SIGINT);
  });
  ASSERT_EQ(cut.exit_code, 128 + SIGINT) << cut.err;
  EXPECT_NE(cut.err.find("the same command continues"), std::string::npos) << cut.err;
  EXPECT_EQ(cut.out, "");
  const ProgramResult rest = run_program(study("study", flags));
  ASSERT_EQ(rest.exit_code, 0) << rest.err;
  EXPECT_EQ(results("study")["cells"].size(), 2u);
  const std::string lines = read_file(metrics);
  EXPECT_EQ(std::count(lines.begin(), lines.end(), '\n'),
            results("study")["cells"][0]["updates"].get<int64_t>());
}

TEST_F(StudyProgram, ListsTheCells) {
  const ProgramResult full = run_program({"study", "state-tracking", "--list"});
  ASSERT_EQ(full.exit_code, 0) << full.err;
  EXPECT_EQ(std::count(full.out.begin(), full.out.end(), '\n'), 288 + 1);
  EXPECT_NE(full.out.find("modular_arithmetic_brackets/gated_deltanet/d64-lr0.01-seed0\n"),
            std::string::npos);
  EXPECT_NE(full.out.find("324 runs"), std::string::npos) << full.out;
  const ProgramResult few =
      run_program({"study", "state-tracking", "--list", "--task", "parity", "--system", "mamba2",
                   "--d-model", "32,48", "--lr", "1e-3,3e-3", "--seeds", "2"});
  EXPECT_EQ(few.out,
            "parity/mamba2/d32-lr0.001-seed0\nparity/mamba2/d32-lr0.003-seed0\n"
            "parity/mamba2/d48-lr0.001-seed0\nparity/mamba2/d48-lr0.003-seed0\n"
            "and the best of each task and system with 2 seeds in all: 5 runs\n");
}

TEST_F(StudyProgram, MistakesAreBadInput) {
  const auto problem = [&](std::vector<std::string> args) {
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    return result.err;
  };
  EXPECT_NE(problem({"study"}).find("subcommand"), std::string::npos);
  EXPECT_EQ(problem({"study", "state-tracking"}),
            "mamba3: name the folder of the study: --output DIR\n");
  EXPECT_NE(problem(study("x", {"--task", "needle"})).find("unknown task 'needle'"),
            std::string::npos);
  EXPECT_NE(problem(study("x", {"--system", "mamba"})).find("unknown system 'mamba'"),
            std::string::npos);
  EXPECT_NE(problem(study("x", {"--d-model", "33"})).find("headdim"), std::string::npos);
  EXPECT_NE(problem(study("x", {"--lr", "1e-3,1e-3"})).find("twice"), std::string::npos);
  EXPECT_NE(problem(study("x", {"--lr", "fast"})).find("--lr"), std::string::npos);
  EXPECT_NE(problem(study("x", {"--seeds", "0"})).find("--seeds"), std::string::npos);
  EXPECT_NE(problem(study("x", {"--dtype", "bf16"})).find("bf16"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder_ / "x"));
}

}  // namespace
}  // namespace mamba3
