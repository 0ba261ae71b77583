#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "support/files.h"
#include "support/program.h"
#include "support/temp_folder.h"
#include "train/tasks.h"

namespace mamba3 {
namespace {

using testing::ProgramResult;
using testing::read_file;
using testing::run_program;
using testing::TempFolder;
using testing::write_file;

class TrainProgram : public ::testing::Test {
 protected:
  TrainProgram() {
    std::string text;
    for (int i = 0; i < 300; ++i) text += std::to_string(i) + " bottles of beer\n";
    write_file(text_, text);
  }

  std::vector<std::string> train(std::string_view folder, std::vector<std::string> more) const {
    std::vector<std::string> args = {"train",     text_, "-o",        folder_ / folder,
                                     "--d-model", "16",  "--mlp",     "0",
                                     "--layers",  "1",   "--d-state", "8",
                                     "--headdim", "8",   "--batch",   "2",
                                     "--context", "16",  "--threads", "2"};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  size_t steps_of(std::string_view folder) const {
    const std::string lines = read_file(folder_ / folder / "metrics.jsonl");
    return static_cast<size_t>(std::count(lines.begin(), lines.end(), '\n'));
  }

  void wait_for_steps(std::string_view folder, size_t steps) const {
    for (int i = 0; i < 1000 && steps_of(folder) < steps; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  TempFolder folder_;
  std::string text_ = folder_ / "text.txt";
};

TEST_F(TrainProgram, TrainsAndReportsJson) {
  const ProgramResult result = run_program(train("run", {"--steps", "20", "--json"}));
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const auto row = nlohmann::json::parse(result.out);
  EXPECT_EQ(row["step"], 20);
  EXPECT_TRUE(row.contains("val_loss"));
}

TEST_F(TrainProgram, InterruptSavesAndResumeContinuesBitForBit) {
  // The same number of steps at once and in two parts. The first part is stopped wherever Ctrl-C
  // finds it.
  const std::vector<std::string> steps = {"--steps", "400", "--val-every", "0"};
  const ProgramResult whole = run_program(train("whole", steps));
  ASSERT_EQ(whole.exit_code, 0) << whole.err;
  const ProgramResult cut = run_program(train("parts", steps), {}, [&](pid_t child) {
    wait_for_steps("parts", 5);
    kill(child, SIGINT);
  });
  ASSERT_EQ(cut.exit_code, 128 + SIGINT) << cut.err;
  EXPECT_NE(cut.err.find("stopped and saved"), std::string::npos) << cut.err;
  EXPECT_LT(steps_of("parts"), 400u);
  const ProgramResult rest = run_program({"train", "-o", folder_ / "parts", "--resume"});
  ASSERT_EQ(rest.exit_code, 0) << rest.err;
  EXPECT_EQ(steps_of("parts"), 400u);
  EXPECT_EQ(read_file(folder_ / "whole" / "model.safetensors"),
            read_file(folder_ / "parts" / "model.safetensors"));
}

TEST_F(TrainProgram, TheSecondInterruptEndsAtOnce) {
  // A step that would take minutes: the first signal cannot be served meanwhile.
  const ProgramResult result =
      run_program(train("run", {"--accumulate", "1000000"}), {}, [&](pid_t child) {
        while (!std::filesystem::exists(folder_ / "run/metrics.jsonl")) {
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        kill(child, SIGINT);
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        kill(child, SIGINT);
      });
  EXPECT_EQ(result.exit_code, 128 + SIGINT);
  EXPECT_EQ(result.err.find("saved"), std::string::npos) << result.err;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run/training.safetensors"));
}

TEST_F(TrainProgram, ParityAndItsEvaluation) {
  const ProgramResult trained = run_program({"train",
                                             "--task",
                                             "parity",
                                             "-o",
                                             folder_ / "run",
                                             "--steps",
                                             "3",
                                             "--d-model",
                                             "16",
                                             "--headdim",
                                             "16",
                                             "--d-state",
                                             "8",
                                             "--batch",
                                             "2",
                                             "--max-length",
                                             "8",
                                             "--val-length",
                                             "8",
                                             "--val-rows",
                                             "10"});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  const ProgramResult result = run_program({"eval", "--task", "parity", "-m", folder_ / "run",
                                            "--length", "5,9", "--count", "40", "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const size_t end = result.out.find('\n');
  for (const std::string& line : {result.out.substr(0, end), result.out.substr(end + 1)}) {
    const auto row = nlohmann::json::parse(line);
    EXPECT_EQ(row["count"], 40);
    const double accuracy = row["accuracy"];
    EXPECT_NEAR(row["scaled_accuracy"].get<double>(), 2 * accuracy - 1, 1e-12);
  }
  EXPECT_EQ(run_program({"eval", "--task", "party", "-m", folder_ / "run"}).exit_code, 2);
}

TEST_F(TrainProgram, ATaskWithMeasuresOfItsOwn) {
  const ProgramResult trained = run_program({"train",
                                             "--task",
                                             "associative_recall",
                                             "--symbols",
                                             "10",
                                             "--pairs",
                                             "4",
                                             "-o",
                                             folder_ / "run",
                                             "--steps",
                                             "2",
                                             "--d-model",
                                             "16",
                                             "--headdim",
                                             "16",
                                             "--d-state",
                                             "8",
                                             "--batch",
                                             "2",
                                             "--max-length",
                                             "18",
                                             "--val-length",
                                             "18",
                                             "--val-rows",
                                             "5"});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  const auto evaluate = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {"eval",    "-m", folder_ / "run", "--length", "15",
                                     "--count", "6",  "--json"};
    args.insert(args.end(), more.begin(), more.end());
    return run_program(args);
  };
  const std::vector<std::string> named = {
      "--task", "associative_recall", "--symbols", "10", "--pairs", "4"};
  const ProgramResult result = evaluate(named);
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)["count"], 6 * 4);  // answers, not sequences
  const ProgramResult as_trained = evaluate({});
  EXPECT_EQ(as_trained.exit_code, 0) << as_trained.err;
  EXPECT_EQ(as_trained.out, result.out);
  const ProgramResult fewer = evaluate({"--pairs", "3"});
  ASSERT_EQ(fewer.exit_code, 0) << fewer.err;
  EXPECT_EQ(nlohmann::json::parse(fewer.out)["count"], 6 * 3);
  const ProgramResult more = evaluate({"--symbols", "11"});
  EXPECT_EQ(more.exit_code, 2);
  EXPECT_NE(more.err.find("has 21 ids, but associative_recall needs 23"), std::string::npos)
      << more.err;

  std::filesystem::remove(folder_ / "run" / "training.safetensors");
  EXPECT_EQ(evaluate(named).out, result.out);
  const ProgramResult unknown = evaluate({});
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_NE(unknown.err.find("name the task, with --task"), std::string::npos) << unknown.err;
}

TEST_F(TrainProgram, TheHelpNamesTheTasks) {
  for (const char* command : {"train", "eval"}) {
    const std::string help = run_program({command, "--help"}).out;
    for (const std::string& name : task_names()) {
      EXPECT_NE(help.find(name), std::string::npos) << command << ": " << name;
    }
  }
}

TEST_F(TrainProgram, MistakesAreBadInput) {
  const auto problem = [&](std::vector<std::string> args) {
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    return result.err;
  };
  EXPECT_NE(problem({"train", "-o", folder_ / "x"}).find("give text files"), std::string::npos);
  EXPECT_NE(problem({"train", folder_ / "absent", "-o", folder_ / "x"}).find("no such file"),
            std::string::npos);
  EXPECT_NE(problem(train("x", {"--bacth", "3"})).find("did you mean"), std::string::npos);
  EXPECT_NE(problem(train("x", {"--headdim", "7"})).find("headdim"), std::string::npos);
  EXPECT_NE(problem({"train", "-o", folder_ / "x", "--resume"}).find("no run to resume"),
            std::string::npos);
}

}  // namespace
}  // namespace mamba3
