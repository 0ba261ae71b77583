#include <gtest/gtest.h>

#include <set>

#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "train/settings.h"

namespace mamba3 {
namespace {

using testing::input_error_of;

TrainSettings with_text() {
  TrainSettings settings;
  settings.text = {"a.txt"};
  return settings;
}

TEST(TrainSettings, NamesAreUnique) {
  std::set<std::string> names;
  TrainSettings settings;
  visit_settings(settings, [&](const SettingInfo& info, auto&) {
    EXPECT_TRUE(names.insert(info.name).second) << info.name;
  });
}

TEST(TrainSettings, AreReadBackFromTheirRecord) {
  TrainSettings settings = with_text();
  settings.lr = 0.1 + 0.2;  // no short decimal form
  settings.seed = ~uint64_t{0};
  settings.mimo = true;
  settings.prompt = "\"\n";
  const TrainSettings back = parse_settings(to_json(settings));
  EXPECT_EQ(to_json(back), to_json(settings));
  EXPECT_EQ(back.lr, settings.lr);
  EXPECT_EQ(back.seed, settings.seed);
  EXPECT_EQ(back.prompt, settings.prompt);
  EXPECT_EQ(parse_settings("{}").steps, TrainSettings().steps);
}

TEST(TrainSettings, DamagedRecordsAreRefused) {
  for (const char* json : {"{", "[]", R"({"lr": "high"})", R"({"colour": 1})"}) {
    EXPECT_THROW(parse_settings(json), InputError) << json;
  }
}

TEST(TrainSettings, OnlyTheNamedOnesAreTakenFromTheFlags) {
  const TrainSettings base = default_settings("parity");
  TrainSettings flags = with_text();
  flags.steps = 7;
  flags.lr = 0.5;
  const TrainSettings merged = overlay(base, flags, {"steps"});
  EXPECT_EQ(merged.steps, 7);
  EXPECT_EQ(merged.lr, base.lr);
  EXPECT_EQ(merged.task, "parity");
  EXPECT_TRUE(merged.text.empty());
}

TEST(TrainSettings, ContinuingMayOnlyChangeWhatIsNotFixed) {
  const TrainSettings run = with_text();
  TrainSettings now = run;
  now.steps = 2000;
  now.val_every = 1;
  EXPECT_NO_THROW(check_continuation(run, now));
  now.batch = 16;
  now.lr = 1;
  EXPECT_EQ(input_error_of([&] { check_continuation(run, now); }),
            "this run was begun with other settings: --batch is 8 and cannot become 16; --lr is "
            "0.003 and cannot become 1.0; leave them out, or begin a new run from these weights "
            "with --init");
}

TEST(TrainSettings, LengthOfTheRun) {
  TrainSettings settings;
  EXPECT_EQ(settings.total_steps(), settings.steps);
  settings.batch = 4;
  settings.context = 10;
  settings.accumulate = 2;
  settings.tokens = 161;
  EXPECT_EQ(settings.total_steps(), 3);
  settings.minutes = 1;
  EXPECT_EQ(settings.total_steps(), 0);
}

TEST(TrainSettings, NonsenseIsRefusedNamingTheFlag) {
  const auto problem = [](auto change) {
    TrainSettings settings = with_text();
    change(settings);
    return input_error_of([&] { settings.check(); });
  };
  EXPECT_NO_THROW(with_text().check());
  for (const std::string& task : task_names()) EXPECT_NO_THROW(default_settings(task).check());
  EXPECT_EQ(problem([](auto& s) { s.text.clear(); }), "give text files to train on, or a --task");
  EXPECT_EQ(problem([](auto& s) { s.task = "parity"; }),
            "give text files to train on, or a --task");
  EXPECT_EQ(problem([](auto& s) { s.batch = 0; }), "--batch must be at least 1, got 0");
  EXPECT_EQ(problem([](auto& s) { s.val_every = -1; }), "--val-every must be at least 0, got -1");
  EXPECT_EQ(problem([](auto& s) { s.held_out = 1; }),
            "--held-out must be from 0 to below 1, got 1");
  EXPECT_EQ(problem([](auto& s) { s.target_accuracy = 1.5; }),
            "--target-accuracy must be from 0 to 1, got 1.5");
  EXPECT_EQ(problem([](auto& s) { s.minutes = -1; }), "--minutes must not be negative, got -1");
  EXPECT_EQ(problem([](auto& s) { s.growth_loss = -1; }),
            "--growth-loss must not be negative, got -1");
  EXPECT_EQ(problem([](auto& s) { s.growth_loss = 1, s.minutes = 1; }),
            "--growth-loss counts updates, so it goes with --steps, not --minutes");
  EXPECT_EQ(problem([](auto& s) { s.tokens = 1, s.minutes = 1; }),
            "give --tokens or --minutes, not both");
  EXPECT_EQ(problem([](auto& s) { s.size = "187m-siso", s.init = "x"; }),
            "--size, --config and --init each say what the model is: give one of them");
  EXPECT_EQ(problem([](auto& s) { s.supervision = "some"; }),
            "--supervision must be every or final, got 'some'");
  EXPECT_EQ(problem([](auto& s) { s.schedule = "linear"; }),
            "unknown learning rate schedule 'linear': use cosine, wsd or constant");
  EXPECT_THROW(default_settings("party"), InputError);
}

// Steps that scale a turn are large; those that are only a decay are as published.
TEST(TrainSettings, StepSizesOfArithmeticDependOnTheMixer) {
  const double published = TrainSettings().dt_max;
  EXPECT_EQ(default_settings("modular_arithmetic").dt_max, 1);
  EXPECT_EQ(default_settings("modular_arithmetic", {"attention", "mamba3"}).dt_max, 1);
  EXPECT_EQ(default_settings("modular_arithmetic", {"mamba2"}).dt_max, published);
  EXPECT_EQ(default_settings("parity").dt_max, published);
}

// The curriculum and the validation have lengths that the task can have.
TEST(TrainSettings, DefaultsFitTheirTask) {
  for (const std::string& name : task_names()) {
    const TrainSettings settings = default_settings(name);
    const auto task = make_task(name, settings.task_measures());
    EXPECT_EQ(settings.task, name);
    EXPECT_NO_THROW(TaskSource(*task, settings.task_options())) << name;
    EXPECT_NO_THROW(model_config(settings, task->vocab())) << name;
    EXPECT_EQ(settings.layers, name == "parity" ? 1 : name.starts_with("modular") ? 3 : 2);
  }
  TrainSettings settings;
  settings.symbols = 9;
  settings.pairs = 3;
  settings.copied = 2;
  EXPECT_EQ(make_task("associative_recall", settings.task_measures())->vocab(), 19);
  EXPECT_EQ(make_task("needle", settings.task_measures())->min_length(), 7);
}

TEST(ModelConfig, FollowsTheFlags) {
  TrainSettings settings;
  settings.d_model = 64;
  settings.headdim = 32;
  settings.mlp = 100;
  settings.mimo = true;
  settings.rank = 2;
  settings.untied = true;
  const Config config = model_config(settings, 250);
  EXPECT_EQ(config.D, 64);
  EXPECT_EQ(config.mixer.H, 4);
  EXPECT_EQ(config.d_mlp, 128);
  EXPECT_EQ(config.mixer.R, 2);
  EXPECT_FALSE(config.tied);
  EXPECT_EQ(config.vocab, 250);
  EXPECT_EQ(config.vocab_padded, 256);
  settings.headdim = 48;
  EXPECT_THROW(model_config(settings, 250), InputError);
}

TEST(ModelConfig, APublishedSizeTakesTheTokenizersVocabulary) {
  TrainSettings settings;
  settings.size = "187m-siso";
  const Config config = model_config(settings, 257);
  EXPECT_EQ(config.D, 768);
  EXPECT_EQ(config.vocab, 257);
  EXPECT_EQ(config.vocab_padded, 272);
}

TEST(ModelConfig, AFileMustHaveRoomForTheVocabulary) {
  const testing::TempFolder folder;
  TrainSettings settings;
  settings.config = folder / "config.json";
  EXPECT_THROW(model_config(settings, 256), InputError);  // no such file
  testing::write_file(folder / "config.json", to_json(model_config(TrainSettings(), 300)));
  EXPECT_EQ(model_config(settings, 256).vocab, 300);
  EXPECT_EQ(input_error_of([&] { model_config(settings, 301); }),
            settings.config + ": vocab_size is 300, but the tokenizer has 301 ids");
}

}  // namespace
}  // namespace mamba3
