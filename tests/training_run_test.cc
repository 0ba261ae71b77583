#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "formats/safetensors.h"
#include "model/checkpoint.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/random.h"
#include "support/temp_folder.h"
#include "train/run.h"

namespace mamba3 {
namespace {

using testing::error_of;
using testing::FileSizeLimit;
using testing::input_error_of;
using testing::read_file;
using testing::TempFolder;
using testing::write_file;

// What `kill -9` would leave: nothing is saved after the last checkpoint.
struct Killed {};

class Script final : public RunObserver {
 public:
  int64_t stop_at = 0;  // ask for a stop after this step
  int64_t kill_at = 0;  // die after this step
  std::vector<MetricsRow> rows = {};

  void on_row(const MetricsRow& row) override {
    rows.push_back(row);
    if (row.step == kill_at) throw Killed();
  }
  // Asked before the row of the step is shown.
  bool stop() override { return static_cast<int64_t>(rows.size()) + 1 == stop_at; }
};

std::string some_text(size_t size) {
  testing::Random random(11);
  std::string text;
  while (text.size() < size) {
    const size_t length = static_cast<size_t>(random.integer(1, 6));
    text += std::string(length, static_cast<char>('a' + random.below(6))) + " ";
  }
  return text;
}

TrainSettings tiny(const std::filesystem::path& text) {
  TrainSettings s;
  s.text = {text};
  s.d_model = 16;
  s.layers = 2;
  s.d_state = 8;
  s.headdim = 8;
  s.mlp = 0;
  s.steps = 6;
  s.batch = 2;
  s.context = 24;
  s.accumulate = 2;
  s.lr = 1e-2;
  s.val_every = 2;
  s.save_every = 0;
  return s;
}

class Training : public ::testing::Test {
 protected:
  Training() { write_file(text_, some_text(2000)); }

  TrainSettings settings() const { return tiny(text_); }
  TrainingRun::Options in(std::string_view name, int threads = 2) const {
    return {.folder = folder_ / name,
            .threads = threads,
            .placement = {testing::test_device(), DType::f32}};
  }
  std::unique_ptr<TrainingRun> resume(std::string_view name) const {
    return TrainingRun::resume({}, {}, in(name));
  }

  TempFolder folder_;
  std::filesystem::path text_ = folder_ / "text.txt";
};

// Same weights and moments, bit for bit.
void expect_same_state(const std::filesystem::path& a, const std::filesystem::path& b) {
  const TensorFile one = read_safetensors(a / "training.safetensors");
  const TensorFile two = read_safetensors(b / "training.safetensors");
  ASSERT_EQ(one.tensors.size(), two.tensors.size());
  for (const StoredTensor& tensor : one.tensors) {
    EXPECT_TRUE(testing::same_bits(tensor.view, two.at(tensor.name))) << tensor.name;
  }
}

// The lines of metrics.jsonl without what the clock says.
std::vector<std::string> metrics(const std::filesystem::path& folder) {
  std::vector<std::string> lines;
  std::ifstream in(folder / "metrics.jsonl");
  for (std::string line; std::getline(in, line);) {
    auto json = nlohmann::ordered_json::parse(line);
    json.erase("seconds");
    json.erase("tokens_per_s");
    lines.push_back(json.dump());
  }
  return lines;
}

TEST_F(Training, LossFallsAndTheCheckpointLoads) {
  TrainSettings s = settings();
  s.steps = 60;
  Script script;
  EXPECT_EQ(TrainingRun::begin(s, in("run"))->run(script), RunEnd::finished);
  ASSERT_EQ(script.rows.size(), 60u);
  EXPECT_LT(*script.rows.back().val_loss, 0.6 * *script.rows[1].val_loss);
  EXPECT_NEAR(*script.rows.back().bits_per_byte, *script.rows.back().val_loss / std::log(2), 1e-9);
  EXPECT_EQ(script.rows.back().tokens, 60 * 2 * 24 * 2);

  const Checkpoint checkpoint = load_checkpoint(folder_ / "run");
  const TensorFile state = read_safetensors(folder_ / "run" / "training.safetensors");
  for (const std::string& name : checkpoint.tensors.names()) {
    EXPECT_TRUE(testing::same_bits(checkpoint.tensors.at(name), state.at("weights." + name)));
  }
}

TEST_F(Training, TwiceTheSameWhateverTheThreads) {
  Script a, b;
  TrainingRun::begin(settings(), in("one", 1))->run(a);
  TrainingRun::begin(settings(), in("two", 3))->run(b);
  expect_same_state(folder_ / "one", folder_ / "two");
  EXPECT_EQ(metrics(folder_ / "one"), metrics(folder_ / "two"));
  TrainSettings other = settings();
  other.seed = 1;
  TrainingRun::begin(other, in("three"))->run(a);
  EXPECT_NE(metrics(folder_ / "one"), metrics(folder_ / "three"));
}

TEST_F(Training, StoppedAndResumedIsUninterrupted) {
  Script whole, first, second;
  TrainingRun::begin(settings(), in("whole"))->run(whole);
  first.stop_at = 3;
  EXPECT_EQ(TrainingRun::begin(settings(), in("parts"))->run(first), RunEnd::stopped);
  EXPECT_EQ(first.rows.size(), 3u);
  EXPECT_EQ(resume("parts")->run(second), RunEnd::finished);
  expect_same_state(folder_ / "whole", folder_ / "parts");
  EXPECT_EQ(metrics(folder_ / "whole"), metrics(folder_ / "parts"));
  EXPECT_GT(second.rows.back().seconds, first.rows.back().seconds);
}

TEST_F(Training, KilledAndResumedFromTheLastCheckpointIsUninterrupted) {
  TrainSettings s = settings();
  s.save_every = 2;
  Script whole, killed, rest;
  TrainingRun::begin(s, in("whole"))->run(whole);
  killed.kill_at = 5;
  EXPECT_THROW(TrainingRun::begin(s, in("parts"))->run(killed), Killed);
  EXPECT_EQ(metrics(folder_ / "parts").size(), 5u);
  resume("parts")->run(rest);
  EXPECT_EQ(rest.rows.front().step, 5);  // the checkpoint is of step 4
  expect_same_state(folder_ / "whole", folder_ / "parts");
  EXPECT_EQ(metrics(folder_ / "whole"), metrics(folder_ / "parts"));
}

TEST_F(Training, CutBetweenTheFilesOfACheckpointIsResumedConsistently) {
  Script whole, first, second, rest;
  TrainingRun::begin(settings(), in("whole"))->run(whole);
  first.stop_at = 2;
  TrainingRun::begin(settings(), in("parts"))->run(first);
  const std::string training = read_file(folder_ / "parts" / "training.safetensors");
  second.stop_at = 2;
  resume("parts")->run(second);
  // The next checkpoint got as far as its weights.
  write_file(folder_ / "parts" / "training.safetensors", training);
  resume("parts")->run(rest);
  EXPECT_EQ(rest.rows.front().step, 3);
  expect_same_state(folder_ / "whole", folder_ / "parts");
  EXPECT_EQ(metrics(folder_ / "whole"), metrics(folder_ / "parts"));
}

TEST_F(Training, AFullDiskLeavesTheOldCheckpoint) {
  TrainSettings s = settings();
  Script first, second;
  first.stop_at = 2;
  TrainingRun::begin(s, in("run"))->run(first);
  const std::string training = read_file(folder_ / "run" / "training.safetensors");
  const std::string model = read_file(folder_ / "run" / "model.safetensors");
  const auto run = resume("run");
  {
    const FileSizeLimit limit(5000);  // enough for the metrics
    const std::string problem = error_of([&] { run->run(second); });
    EXPECT_EQ(problem.find("cannot write"), 0u) << problem;
  }
  EXPECT_EQ(read_file(folder_ / "run" / "training.safetensors"), training);
  EXPECT_EQ(read_file(folder_ / "run" / "model.safetensors"), model);
  resume("run");  // and it can be continued
}

TEST_F(Training, ResumeTakesNewLengthsButNoOtherData) {
  Script script;
  TrainingRun::begin(settings(), in("run"))->run(script);
  TrainSettings flags;
  flags.steps = 8;
  const auto longer = TrainingRun::resume(flags, {"steps"}, in("run"));
  Script more;
  EXPECT_EQ(longer->run(more), RunEnd::finished);
  EXPECT_EQ(more.rows.front().step, 7);
  EXPECT_EQ(more.rows.back().step, 8);

  flags.batch = 3;
  EXPECT_THROW(TrainingRun::resume(flags, {"batch"}, in("run")), InputError);
  flags.text = {text_};
  EXPECT_NO_THROW(TrainingRun::resume(flags, {"text"}, in("run")));  // the same again
  write_file(text_, some_text(2000) + "x");
  EXPECT_EQ(input_error_of([&] { resume("run"); }),
            "the text is not the one that this run was begun with: some file has changed");
  EXPECT_EQ(
      input_error_of([&] { resume("absent"); }),
      (folder_ / "absent").string() + " has no training.safetensors: there is no run to resume");
}

TEST_F(Training, DamagedTrainingFilesAreRefused) {
  Script script;
  TrainingRun::begin(settings(), in("run"))->run(script);
  const auto file = folder_ / "run" / "training.safetensors";
  const std::string whole = read_file(file);
  write_file(file, whole.substr(0, whole.size() / 2));
  EXPECT_THROW(resume("run"), InputError);
  std::string other = whole;
  other.replace(other.find("training state 1"), 16, "training state 9");
  write_file(file, other);
  EXPECT_NE(input_error_of([&] { resume("run"); }).find("its format is"), std::string::npos);
  EXPECT_NE(input_error_of([&] {
              read_run_settings(folder_ / "run");
            }).find("training.safetensors: its format is"),
            std::string::npos);
  other = whole;
  other.replace(other.find("m.backbone.norm_f.weight"), 24, "m.backbone.norm_g.weight");
  write_file(file, other);
  EXPECT_NE(input_error_of([&] { resume("run"); }).find("m.backbone.norm_f.weight"),
            std::string::npos);
}

TEST_F(Training, AnExistingRunIsNotReplacedUnasked) {
  Script script;
  TrainingRun::begin(settings(), in("run"))->run(script);
  EXPECT_THROW(TrainingRun::begin(settings(), in("run")), InputError);
  TrainingRun::Options options = in("run");
  options.overwrite = true;
  Script again;
  TrainingRun::begin(settings(), options)->run(again);
  EXPECT_EQ(metrics(folder_ / "run").size(), 6u);
}

TEST_F(Training, StartsFromACheckpoint) {
  Script script;
  TrainingRun::begin(settings(), in("first"))->run(script);
  TrainSettings s = settings();
  s.init = folder_ / "first";
  s.lr = 1e-9;
  s.d_model = 1024;  // the checkpoint says what the model is
  Script next;
  TrainingRun::begin(s, in("second"))->run(next);
  EXPECT_EQ(next.rows.front().step, 1);
  EXPECT_NEAR(*next.rows.back().val_loss, *script.rows.back().val_loss, 1e-5);
}

TEST_F(Training, DivergenceEndsTheRunAndKeepsTheCheckpoint) {
  TrainSettings s = settings();
  s.steps = 40;
  s.lr = 1e30;
  s.warmup = 0;
  s.save_every = 1;
  Script script;
  const auto run = TrainingRun::begin(s, in("run"));
  const std::string problem = error_of([&] { run->run(script); });
  EXPECT_NE(problem.find("not finite 5 times in a row"), std::string::npos) << problem;
  ASSERT_GE(script.rows.size(), 5u);
  for (size_t i = 1; i <= 5; ++i) EXPECT_TRUE(script.rows[script.rows.size() - i].skipped);
  EXPECT_TRUE(load_checkpoint(folder_ / "run").warnings.empty());
}

TEST_F(Training, ByTheClockTheScheduleEndsWithTheTime) {
  TrainSettings s = settings();
  s.minutes = 0.005;
  s.warmup = 0.5;
  Script script;
  EXPECT_EQ(TrainingRun::begin(s, in("run"))->run(script), RunEnd::finished);
  EXPECT_GT(script.rows.size(), 2u);
  EXPECT_EQ(script.rows.front().lr, 0);
  EXPECT_GE(script.rows.back().seconds, 0.3);
  EXPECT_LT(script.rows.back().seconds, 5);
  EXPECT_TRUE(script.rows.back().val_loss);
}

TEST_F(Training, WritesSamples) {
  TrainSettings s = settings();
  s.steps = 4;
  s.sample_every = 2;
  s.sample_tokens = 10;
  Script script;
  TrainingRun::begin(s, in("run"))->run(script);
  EXPECT_FALSE(script.rows[0].sample);
  ASSERT_TRUE(script.rows[1].sample);
  ASSERT_TRUE(script.rows[3].sample);
  EXPECT_FALSE(script.rows[3].sample->empty());
}

TEST_F(Training, TasksAreScoredByAccuracy) {
  TrainSettings s = default_settings("parity");
  s.d_model = 16;
  s.d_state = 8;
  s.headdim = 16;
  s.steps = 4;
  s.batch = 4;
  s.max_length = 8;
  s.growth = 0.5;
  s.val_length = 12;
  s.val_rows = 20;
  s.val_every = 2;
  Script whole, first, rest;
  TrainingRun::begin(s, in("whole"))->run(whole);
  ASSERT_TRUE(whole.rows[1].accuracy);
  EXPECT_EQ(std::fmod(*whole.rows[1].accuracy * 20, 1), 0);
  EXPECT_FALSE(whole.rows[1].bits_per_byte);
  EXPECT_EQ(whole.rows[0].tokens, 4 * 5);  // halfway from 3 to 8 in half the run
  EXPECT_EQ(whole.rows[3].tokens - whole.rows[2].tokens, 4 * 8);
  first.stop_at = 1;
  TrainingRun::begin(s, in("parts"))->run(first);
  resume("parts")->run(rest);
  expect_same_state(folder_ / "whole", folder_ / "parts");
}

// With --growth-loss the length waits for small losses; what it waited for is in the checkpoint.
TEST_F(Training, TheCurriculumWaitsForTheLoss) {
  TrainSettings s = default_settings("parity");
  s.d_model = 16;
  s.d_state = 8;
  s.headdim = 16;
  s.steps = 8;
  s.batch = 4;
  s.lr = 1e-2;
  s.max_length = 48;  // each update that counts makes the rows longer
  s.growth = 1;
  s.val_rows = 0;
  s.growth_loss = 1e9;  // every update counts: the plain curriculum
  Script plain, waiting, first, rest;
  TrainingRun::begin(s, in("always"))->run(plain);
  s.growth_loss = 0;
  TrainingRun::begin(s, in("plain"))->run(waiting);
  EXPECT_EQ(metrics(folder_ / "always"), metrics(folder_ / "plain"));

  // A loss that some of the updates stay below, and the lengths that follow from which.
  std::vector<double> losses;
  for (const MetricsRow& row : plain.rows) losses.push_back(row.loss);
  std::sort(losses.begin(), losses.end());
  s.growth_loss = losses[3] + 1e-4;
  waiting.rows.clear();
  TrainingRun::begin(s, in("whole"))->run(waiting);
  int64_t tokens = 0, solved = 0, first_solved = 0;
  for (const MetricsRow& row : waiting.rows) {
    const Curriculum length{.first = s.min_length, .last = s.max_length, .growth = s.growth};
    tokens += s.batch * length.at(static_cast<double>(solved + 1) / 8);
    EXPECT_EQ(row.tokens, tokens);
    if (row.loss < s.growth_loss && ++solved == 1) first_solved = row.step;
  }
  EXPECT_GT(solved, 0);
  EXPECT_LT(solved, 8);
  ASSERT_LT(first_solved, 8);

  first.stop_at = first_solved;
  TrainingRun::begin(s, in("parts"))->run(first);
  TrainingRun::resume({}, {}, in("parts", 1))->run(rest);
  EXPECT_EQ(metrics(folder_ / "whole"), metrics(folder_ / "parts"));
  expect_same_state(folder_ / "whole", folder_ / "parts");
}

// The losses of an uninterrupted run in f32, and of one that continues elsewhere after each step.
TEST_F(Training, MovesBetweenTheDevices) {
  if (testing::test_device() == Device::cpu) GTEST_SKIP() << "needs a GPU";
  Script whole, rest;
  TrainingRun::begin(settings(), in("whole"))->run(whole);
  TrainingRun::Options options = in("moving");
  for (int64_t step = 1; step <= settings().steps; ++step) {
    options.placement.device = step % 2 == 0 ? Device::cuda : Device::cpu;
    Script script;
    script.stop_at = 1;
    const auto run =
        step == 1 ? TrainingRun::begin(settings(), options) : TrainingRun::resume({}, {}, options);
    run->run(script);
    ASSERT_EQ(script.rows.size(), 1u);
    EXPECT_NEAR(script.rows[0].loss, whole.rows[static_cast<size_t>(step - 1)].loss, 1e-4);
  }
}

// --recompute gives the bits of a run without, in the types of this device.
TEST_F(Training, RecomputingChangesNoBit) {
  for (const DType dtype : testing::test_dtypes()) {
    const std::string type(name_of(dtype));
    const auto train = [&](bool recompute, std::string_view name) {
      TrainSettings s = settings();
      s.recompute = recompute;
      TrainingRun::Options options = in(name);
      options.placement.dtype = dtype;
      Script script;
      TrainingRun::begin(s, options)->run(script);
    };
    train(false, "kept-" + type);
    train(true, "recomputed-" + type);
    expect_same_state(folder_ / ("kept-" + type), folder_ / ("recomputed-" + type));
    EXPECT_EQ(metrics(folder_ / ("kept-" + type)), metrics(folder_ / ("recomputed-" + type)));
  }
}

// Twice the same bits, and a loss like that of f32.
TEST_F(Training, LearnsInBf16) {
  if (testing::test_device() == Device::cpu) GTEST_SKIP() << "needs a GPU";
  TrainSettings s = settings();
  s.steps = 60;
  Script exact, one, two;
  TrainingRun::begin(s, in("exact"))->run(exact);
  TrainingRun::Options options = in("one");
  options.placement.dtype = DType::bf16;
  TrainingRun::begin(s, options)->run(one);
  options.folder = folder_ / "two";
  TrainingRun::begin(s, options)->run(two);
  expect_same_state(folder_ / "one", folder_ / "two");
  EXPECT_NEAR(*one.rows.back().val_loss, *exact.rows.back().val_loss,
              0.05 * *exact.rows.back().val_loss);
}

TEST_F(Training, ATaskEndsAtItsTargetAccuracy) {
  TrainSettings s = default_settings("parity");
  s.d_model = 16;
  s.d_state = 8;
  s.headdim = 16;
  s.steps = 6;
  s.batch = 4;
  s.max_length = 8;
  s.val_length = 12;
  s.val_rows = 20;
  s.val_every = 2;
  s.target_accuracy = 0.01;  // reached at once, even by guessing
  Script script, rest;
  EXPECT_EQ(TrainingRun::begin(s, in("run"))->run(script), RunEnd::finished);
  EXPECT_EQ(script.rows.size(), 2u);
  const auto ended = resume("run");  // it knows that it is at its end
  EXPECT_EQ(ended->progress(), 1);
  EXPECT_EQ(ended->run(rest), RunEnd::finished);
  EXPECT_TRUE(rest.rows.empty());
}

TEST_F(Training, BadTextIsRefusedBeforeAnythingIsWritten) {
  TrainSettings s = settings();
  s.text = {folder_ / "empty"};
  write_file(folder_ / "empty", "");
  EXPECT_EQ(input_error_of([&] { TrainingRun::begin(s, in("run")); }),
            "there is no text to train on: " + (folder_ / "empty").string() + " is empty");
  write_file(folder_ / "empty", "short");
  EXPECT_EQ(input_error_of([&] { TrainingRun::begin(s, in("run")); }),
            "the training text has 4 tokens, but a context of 24 needs at least 25: give more text "
            "or a smaller --context");
  EXPECT_FALSE(std::filesystem::exists(folder_ / "run"));
}

}  // namespace
}  // namespace mamba3
