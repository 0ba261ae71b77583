#include "train/study.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "support/errors.h"
#include "support/files.h"
#include "support/study.h"
#include "support/temp_folder.h"
#include "train/study_run.h"

namespace mamba3 {
namespace {

using testing::error_of;
using testing::input_error_of;
using testing::make_result;
using testing::read_file;
using testing::TempFolder;
using testing::tiny_study;
using testing::write_file;

// The records of the folder without what the clock says.
std::string results_without_times(const std::filesystem::path& folder) {
  auto json = nlohmann::ordered_json::parse(read_file(folder / "results.json"));
  for (auto& cell : json["cells"]) cell.erase("seconds");
  return json.dump(1);
}

class Watcher : public StudyObserver {
 public:
  int64_t stop_after_rows = -1, stop_after_results = -1;
  std::vector<StudyJob> jobs;
  int64_t rows = 0;

  void on_row(const StudyCell&, const MetricsRow&) override { ++rows; }
  void on_result(const StudyJob& job, const CellResult&) override { jobs.push_back(job); }
  bool stop() override { return rows == stop_after_rows || std::ssize(jobs) == stop_after_results; }
};

TEST(StudyGrid, TheFullOneIsThePapers) {
  const StudyGrid grid = full_study();
  grid.check();
  EXPECT_EQ(grid.tasks, (std::vector<std::string>{"parity", "modular_arithmetic",
                                                  "modular_arithmetic_brackets"}));
  EXPECT_EQ(grid.systems, (std::vector<std::string>{"mamba3", "mamba3_mimo", "mamba3_standard_rope",
                                                    "mamba3_no_rope", "mamba2", "gated_deltanet"}));
  EXPECT_EQ(grid.d_model, (std::vector<int64_t>{32, 64}));
  ASSERT_EQ(grid.lr.size(), 8u);
  EXPECT_EQ(grid.lr.front(), 1e-4);
  EXPECT_EQ(grid.lr.back(), 1e-2);
  for (size_t i = 1; i < grid.lr.size(); ++i) {
    EXPECT_NEAR(std::log10(grid.lr[i] / grid.lr[i - 1]), 2.0 / 7, 2e-3);
  }
  EXPECT_EQ(due_jobs(grid, {}).size(), 3u * 6 * 16);
  EXPECT_EQ(progress_of(grid, {}).cells, 3 * 6 * (16 + 2));
  EXPECT_EQ(progress_of(grid, {}).updates_left, 6 * 18 * (10000 + 10000 + 30000));
  EXPECT_EQ(grid.other_lengths(), (std::vector<int64_t>{16, 32, 64, 128, 512, 1024, 4096}));
  EXPECT_EQ(tiny_study().other_lengths(), (std::vector<int64_t>{4, 16, 32, 128}));
  std::set<std::string> names;
  for (const StudyJob& job : due_jobs(grid, {})) names.insert(job.cell.name());
  EXPECT_EQ(names.size(), 3u * 6 * 16);
  EXPECT_TRUE(names.contains("parity/mamba2/d64-lr0.000193-seed0"));
  reduced_study().check();
}

TEST(StudyGrid, SettingsAreThePapers) {
  const StudyGrid grid = full_study();
  for (const auto& [task, layers] :
       {std::pair{"parity", 1}, {"modular_arithmetic", 3}, {"modular_arithmetic_brackets", 3}}) {
    const TrainSettings s =
        settings_of(grid, {.task = task, .system = "mamba3", .d_model = 32, .lr = 1e-3, .seed = 2});
    EXPECT_EQ(s.task, task);
    EXPECT_EQ(s.layers, layers);
    EXPECT_EQ(s.d_model, 32);
    EXPECT_EQ(s.lr, 1e-3);
    EXPECT_EQ(s.seed, 2u);
    EXPECT_EQ(s.d_state, 64);
    EXPECT_EQ(s.headdim, 32);
    EXPECT_EQ(s.mlp, 0);
    EXPECT_EQ(s.batch, 256);
    EXPECT_EQ(s.steps, task == std::string("modular_arithmetic_brackets") ? 30000 : 10000);
    // "Length curriculum with a minimum length of 3, the maximum growing from 40 to 160." Parity is
    // learnt from the shortest on, and brackets from long ones.
    const bool drawn = task == std::string("modular_arithmetic");
    EXPECT_EQ(s.shortest, drawn ? 3 : 0);
    EXPECT_EQ(s.min_length, drawn ? 40 : 3);
    EXPECT_EQ(s.max_length, 160);
    EXPECT_EQ(s.val_length, 256);
    EXPECT_EQ(s.target_accuracy, 1);
    // The rest is what is tuned for the task.
    EXPECT_EQ(s.weight_decay, default_settings(task).weight_decay);
    EXPECT_EQ(s.eps, default_settings(task).eps);
    EXPECT_EQ(s.dt_max, default_settings(task).dt_max);
    const StudyCell few = {.task = task, .system = "mamba3", .d_model = 32, .lr = 1e-3, .seed = 0};
    const TrainSettings reduced = settings_of(reduced_study(), few);
    EXPECT_EQ(reduced.growth, layers == 1 ? s.growth : 0.2);
    EXPECT_EQ(reduced.shortest, 0);
    EXPECT_EQ(reduced.min_length, 3);
  }
}

TEST(StudyGrid, EverySystemIsWhatItsNameSays) {
  const StudyGrid grid = full_study();
  const auto config_of = [&](const char* system) {
    return model_config(
        settings_of(
            grid,
            {.task = "modular_arithmetic", .system = system, .d_model = 64, .lr = 1e-3, .seed = 0}),
        10);
  };
  const Config siso = config_of("mamba3");
  EXPECT_EQ(siso.kind(2), LayerKind::mamba3);
  EXPECT_EQ(siso.mixer.S, 32);
  EXPECT_EQ(siso.mixer.rope, Rope::data);
  EXPECT_EQ(siso.mixer.H, 4);
  EXPECT_EQ(siso.mixer.N, 64);
  EXPECT_FALSE(siso.mixer.mimo);
  EXPECT_TRUE(config_of("mamba3_mimo").mixer.mimo);
  EXPECT_EQ(config_of("mamba3_mimo").mixer.R, 4);
  EXPECT_EQ(config_of("mamba3_standard_rope").mixer.rope, Rope::standard);
  EXPECT_EQ(config_of("mamba3_standard_rope").mixer.S, 32);
  EXPECT_EQ(config_of("mamba3_no_rope").mixer.S, 0);
  const Config mamba2 = config_of("mamba2");
  for (const int64_t layer : {0, 1, 2}) EXPECT_EQ(mamba2.kind(layer), LayerKind::mamba2);
  EXPECT_EQ(mamba2.mamba2.N, 64);
  const Config delta = config_of("gated_deltanet");
  for (const int64_t layer : {0, 1, 2}) {
    EXPECT_EQ(delta.kind(layer), LayerKind::gated_deltanet);
  }
  EXPECT_TRUE(delta.delta.negative);
  EXPECT_EQ(delta.delta.K, 64);
  // The step is the task's where it scales a turn, and the published one where it is a decay.
  for (const char* ablation : {"mamba3_mimo", "mamba3_standard_rope", "mamba3_no_rope"}) {
    EXPECT_EQ(config_of(ablation).dt_min, siso.dt_min);
    EXPECT_EQ(config_of(ablation).dt_max, siso.dt_max);
  }
  EXPECT_EQ(siso.dt_min, 0.5);
  for (const Config& other : {mamba2, delta}) {
    EXPECT_EQ(other.dt_min, Config().dt_min);
    EXPECT_EQ(other.dt_max, Config().dt_max);
  }
}

TEST(StudyGrid, KnowsTable5b) {
  EXPECT_EQ(paper_accuracy("parity", "mamba3"), 1.0);
  EXPECT_DOUBLE_EQ(*paper_accuracy("modular_arithmetic", "mamba2"), 0.4781);
  EXPECT_DOUBLE_EQ(*paper_accuracy("modular_arithmetic_brackets", "gated_deltanet"), 0.935);
  EXPECT_DOUBLE_EQ(*paper_accuracy("parity", "mamba3_standard_rope"), 0.0156);
  EXPECT_DOUBLE_EQ(*paper_accuracy("modular_arithmetic_brackets", "mamba3_no_rope"), 0.0072);
  EXPECT_FALSE(paper_accuracy("parity", "mamba3_mimo"));
  EXPECT_FALSE(paper_accuracy("needle", "mamba3"));
}

TEST(StudyGrid, MistakesAreNamed) {
  const auto problem = [](auto change) {
    StudyGrid grid = tiny_study();
    change(grid);
    return input_error_of([&] { grid.check(); });
  };
  EXPECT_EQ(problem([](StudyGrid& g) { g.tasks = {"party"}; }),
            "unknown task 'party' of the study: use parity, modular_arithmetic, "
            "modular_arithmetic_brackets");
  EXPECT_EQ(problem([](StudyGrid& g) { g.systems = {"mamba4"}; }),
            "unknown system 'mamba4' of the study: use mamba3, mamba3_mimo, mamba3_standard_rope, "
            "mamba3_no_rope, mamba2, gated_deltanet");
  EXPECT_EQ(problem([](StudyGrid& g) {
              g.lr = {1e-3, 2e-3, 1e-3};
            }),
            "the study has the cell parity/mamba3/d16-lr0.001-seed0 twice: give each value once");
  EXPECT_EQ(problem([](StudyGrid& g) { g.lr.clear(); }), "the study needs at least one --lr");
  EXPECT_EQ(problem([](StudyGrid& g) { g.systems.clear(); }),
            "the study needs at least one --system");
  EXPECT_EQ(problem([](StudyGrid& g) { g.seeds = 0; }), "--seeds must be at least 1, got 0");
  EXPECT_NE(problem([](StudyGrid& g) { g.d_model = {7}; }).find("headdim"), std::string::npos);
  EXPECT_NE(problem([](StudyGrid& g) { g.lr = {-1}; }).find("learning rate"), std::string::npos);
}

TEST(StudyChoice, MedianIsTheMiddle) {
  EXPECT_EQ(median({3}), 3);
  EXPECT_EQ(median({9, 1, 4}), 4);
  EXPECT_EQ(median({8, 1, 4, 2}), 3);
}

TEST(StudyChoice, TheBestIsTheMostAccurateThenTheSteadiestThenTheFastest) {
  StudyGrid grid = tiny_study();
  grid.lr = {1e-3, 2e-3, 3e-3, 4e-3};
  const auto cells = grid_cells(grid, "parity", "mamba3");
  StudyResults results;
  EXPECT_FALSE(best_cell(grid, results, "parity", "mamba3"));
  results[cells[1].name()] = make_result(0.5, 0.5, 10);
  EXPECT_EQ(best_cell(grid, results, "parity", "mamba3"), cells[1]);
  results[cells[0].name()] = make_result(0.8, 0.1, 10);
  results[cells[2].name()] = make_result(0.8, 0.7, 10);
  EXPECT_EQ(best_cell(grid, results, "parity", "mamba3"), cells[2]);
  results[cells[3].name()] = make_result(0.8, 0.7, 9);
  EXPECT_EQ(best_cell(grid, results, "parity", "mamba3"), cells[3]);
  results[cells[2].name()].updates = 9;  // a tie: the first
  EXPECT_EQ(best_cell(grid, results, "parity", "mamba3"), cells[2]);
  EXPECT_FALSE(best_cell(grid, results, "parity", "mamba2"));
}

TEST(StudyChoice, SeedsFollowTheGridAndOtherLengthsTheSeeds) {
  StudyGrid grid = tiny_study();
  grid.systems = {"mamba3", "mamba2"};
  grid.lr = {1e-3, 2e-3};
  const auto cells = grid_cells(grid, "parity", "mamba3");
  StudyResults results;
  EXPECT_EQ(due_jobs(grid, results).size(), 4u);
  for (const StudyCell& cell : grid_cells(grid, "parity", "mamba2")) {
    results[cell.name()] = make_result(0.1, 0.1, 10);
  }
  results[cells[0].name()] = make_result(1, 1, 10);
  // mamba2's grid is finished, so its other seeds are due; of mamba3's one cell is missing.
  std::vector<StudyJob> due = due_jobs(grid, results);
  ASSERT_EQ(due.size(), 3u);
  EXPECT_EQ(due[0].cell, cells[1]);
  EXPECT_EQ(due[1].cell.name(), "parity/mamba2/d16-lr0.001-seed1");
  EXPECT_EQ(due[2].cell.name(), "parity/mamba2/d16-lr0.001-seed2");
  EXPECT_EQ(progress_of(grid, results).cells, 8);
  EXPECT_EQ(progress_of(grid, results).cells_done, 3);
  EXPECT_EQ(progress_of(grid, results).updates_done, 30);
  EXPECT_EQ(progress_of(grid, results).updates_left, 5 * grid.steps);

  results[cells[1].name()] = make_result(0.3, 0.3, 10);
  for (const StudyCell& cell : seed_cells(grid, due[1].cell)) {
    results[cell.name()] = make_result(0.1, 0.1, 10);
  }
  due = due_jobs(grid, results);
  ASSERT_EQ(due.size(), 2u + 3);  // mamba2's three models are to be tried
  EXPECT_EQ(due[0].cell.name(), "parity/mamba3/d16-lr0.001-seed1");
  results[due[0].cell.name()] = make_result(0.89, 0.89, 10);
  results[due[1].cell.name()] = make_result(0.9, 0.2, 10);
  due = due_jobs(grid, results);
  ASSERT_EQ(due.size(), 6u);
  EXPECT_EQ(due[0], (StudyJob{StudyJob::Kind::try_lengths, cells[0]}));
  EXPECT_EQ(due[5], (StudyJob{StudyJob::Kind::try_lengths,
                              {"parity", "mamba2", cells[0].d_model, cells[0].lr, 2}}));
  for (const StudyJob& job : due) {
    CellResult& result = results[job.cell.name()];
    const auto lengths = lengths_to_try(grid, result);
    // Of mamba3's seeds 0 and 2; the others do not solve the task.
    const bool solved = job.cell.system == "mamba3" && job.cell.seed != 1;
    EXPECT_EQ(lengths, (solved ? std::vector<int64_t>{4, 16, 32, 128} : std::vector<int64_t>{4}));
    for (const int64_t length : lengths) {
      result.lengths.push_back({length, 9, 1.0 / static_cast<double>(length)});
    }
  }
  results["parity/mamba3/d16-lr0.001-seed2"].lengths[3].accuracy = 0.75;
  EXPECT_TRUE(due_jobs(grid, results).empty());
  EXPECT_EQ(progress_of(grid, results).cells_done, 8);

  const std::vector<StudyRow> table = study_table(grid, results);
  ASSERT_EQ(table.size(), 2u);
  EXPECT_EQ(table[0].best, 1);
  EXPECT_EQ(table[0].best_cell, cells[0]);
  EXPECT_EQ(table[0].median, 0.9);
  std::vector<std::array<double, 3>> by_length;  // length, models, their median
  for (const LengthMedian& l : table[0].by_length) {
    by_length.push_back({static_cast<double>(l.length), static_cast<double>(l.models), l.accuracy});
  }
  EXPECT_EQ(by_length, (std::vector<std::array<double, 3>>{{4, 3, 1 / 4.0},
                                                           {8, 3, 0.89},  // after the last update
                                                           {16, 2, 1 / 16.0},
                                                           {32, 2, 1 / 32.0},
                                                           {128, 2, (1 / 128.0 + 0.75) / 2}}));
  EXPECT_EQ(table[1].median, 0.1);
  EXPECT_EQ(table[1].by_length.size(), 2u);
}

TEST(StudyRecord, ThereAndBack) {
  const StudyGrid grid = tiny_study();
  const StudyCell cell = grid_cells(grid, "parity", "mamba3")[0];
  const TrainSettings settings = settings_of(grid, cell);
  CellResult result = make_result(0.75, -0.125, 7);
  result.diverged = true;
  result.lengths = {{16, 256, 0.5}};
  const std::string json = to_json(cell, settings, result);
  const CellResult back = parse_result(json, settings, "result.json");
  EXPECT_EQ(to_json(cell, settings, back), json);
  auto older = nlohmann::ordered_json::parse(json);
  older["longer"] = older["lengths"];
  older.erase("lengths");
  EXPECT_EQ(to_json(cell, settings, parse_result(older.dump(), settings, "old.json")), json);
  EXPECT_EQ(back.last, -0.125);
  EXPECT_TRUE(back.diverged);

  EXPECT_EQ(input_error_of([&] { parse_result("{}", settings, "some.json"); }).substr(0, 21),
            "some.json is damaged:");
  EXPECT_EQ(input_error_of([&] { parse_result("x", settings, "some.json"); }).substr(0, 21),
            "some.json is damaged:");
  TrainSettings other = settings;
  other.steps += 1;
  EXPECT_EQ(input_error_of([&] { parse_result(json, other, "some.json"); }),
            "some.json is of other settings than those of this study: choose another folder");
  auto newer = nlohmann::ordered_json::parse(json);
  newer["settings"]["from-the-future"] = 1;
  EXPECT_EQ(input_error_of([&] { parse_result(newer.dump(), settings, "some.json"); }),
            "some.json: there are training settings that this version does not know");
}

class StudyRuns : public ::testing::Test {
 protected:
  Study::Options in(std::string_view name, int parallel = 1) const {
    return {.folder = folder_ / name,
            .parallel = parallel,
            .threads = 1,
            .placement = {testing::test_device(), DType::f32}};
  }
  RunEnd run(const StudyGrid& grid, std::string_view name, Watcher& watcher,
             int parallel = 1) const {
    Study study(grid, in(name, parallel));
    return study.run(watcher);
  }

  TempFolder folder_;
};

TEST_F(StudyRuns, TrainsTheGridThenTheSeeds) {
  const StudyGrid grid = tiny_study();  // two learning rates, three seeds
  Watcher watcher;
  Study study(grid, in("study"));
  EXPECT_EQ(study.run(watcher), RunEnd::finished);
  ASSERT_EQ(watcher.jobs.size(), 4u + 3);  // and the best's seeds are tried on other lengths
  EXPECT_EQ(watcher.jobs[3].cell.seed, 2u);
  EXPECT_EQ(watcher.jobs[6].kind, StudyJob::Kind::try_lengths);
  EXPECT_EQ(watcher.rows, 4 * grid.steps);
  const auto json = nlohmann::json::parse(read_file(folder_ / "study/results.json"));
  EXPECT_EQ(json["cells"].size(), 4u);
  EXPECT_EQ(json["table"][0]["cells_done"], 2);
  for (const StudyJob& job : watcher.jobs) {
    const CellResult& result = study.results().at(job.cell.name());
    EXPECT_EQ(result.updates, grid.steps);
    EXPECT_GE(result.best, result.last);
    EXPECT_EQ(std::fmod((result.last + 1) / 2 * static_cast<double>(grid.val_rows), 1), 0);
  }
  // Nothing is left, and what is there is what was there.
  Watcher again;
  const std::string before = read_file(folder_ / "study/results.json");
  EXPECT_EQ(run(grid, "study", again), RunEnd::finished);
  EXPECT_TRUE(again.jobs.empty());
  EXPECT_EQ(again.rows, 0);
  EXPECT_EQ(read_file(folder_ / "study/results.json"), before);
}

TEST_F(StudyRuns, InterruptedAndContinuedIsUninterrupted) {
  const StudyGrid grid = tiny_study();
  Watcher whole;
  EXPECT_EQ(run(grid, "whole", whole), RunEnd::finished);
  Watcher one, two, rest;
  one.stop_after_results = 1;  // after a cell
  EXPECT_EQ(run(grid, "parts", one), RunEnd::stopped);
  EXPECT_EQ(one.jobs.size(), 1u);
  two.stop_after_rows = 3;  // within one
  EXPECT_EQ(run(grid, "parts", two), RunEnd::stopped);
  EXPECT_TRUE(two.jobs.empty());
  EXPECT_EQ(run(grid, "parts", rest, /*parallel=*/2), RunEnd::finished);
  EXPECT_EQ(rest.jobs.size(), 3u + 3);
  EXPECT_LT(rest.rows, 3 * grid.steps);  // the run that was cut goes on
  EXPECT_EQ(results_without_times(folder_ / "whole"), results_without_times(folder_ / "parts"));
}

// results.json is all that one needs of a study to widen its grid elsewhere.
TEST_F(StudyRuns, KnownResultsAreNotTrainedAgain) {
  const StudyGrid grid = tiny_study();
  Watcher first, second, changed, missing;
  EXPECT_EQ(run(grid, "first", first), RunEnd::finished);
  const auto from_first = [&](const StudyGrid& of, std::string_view folder, Watcher& watcher) {
    Study::Options options = in(folder);
    options.known = folder_ / "first/results.json";
    Study study(of, options);
    return study.run(watcher);
  };
  StudyGrid wider = grid;
  wider.lr.push_back(1e-4);
  EXPECT_EQ(from_first(wider, "second", second), RunEnd::finished);
  EXPECT_EQ(second.jobs[0].cell.lr, 1e-4);
  EXPECT_LT(second.jobs.size(), 7u);
  Watcher whole;
  EXPECT_EQ(run(wider, "whole", whole), RunEnd::finished);
  EXPECT_EQ(results_without_times(folder_ / "second"), results_without_times(folder_ / "whole"));
  // Cells of other settings are other cells.
  StudyGrid other = grid;
  other.steps += 1;
  EXPECT_EQ(from_first(other, "other", changed), RunEnd::finished);
  EXPECT_EQ(changed.jobs.size(), 7u);

  EXPECT_EQ(input_error_of([&] { parse_results("{}", grid, "some.json"); }).substr(0, 47),
            "some.json is not the results.json of a study: [");
  std::filesystem::remove(folder_ / "first/results.json");
  EXPECT_EQ(input_error_of([&] { from_first(grid, "third", missing); }).substr(0, 11),
            "cannot read");
}

// Of the setting that is the best so far, also where cells of the grid are missing.
TEST_F(StudyRuns, KnownSeedsAreKept) {
  const StudyGrid grid = tiny_study();
  Watcher first, second;
  EXPECT_EQ(run(grid, "first", first), RunEnd::finished);
  StudyGrid wider = grid;
  wider.d_model.push_back(96);
  Study::Options options = in("second");
  options.known = folder_ / "first/results.json";
  second.stop_after_rows = 1;
  EXPECT_EQ(Study(wider, options).run(second), RunEnd::stopped);
  const auto cells = [&](const char* folder) {
    return nlohmann::json::parse(read_file(folder_ / folder / "results.json")).at("cells").size();
  };
  EXPECT_EQ(cells("second"), cells("first"));
  const StudyResults results = read_results(wider, folder_ / "second", options.known);
  EXPECT_EQ(static_cast<size_t>(progress_of(wider, results).cells_done), cells("first"));
  EXPECT_EQ(study_table(wider, results)[0].median,
            study_table(grid, read_results(grid, folder_ / "first"))[0].median);
}

TEST_F(StudyRuns, AKnownModelIsMadeAgainToBeTried) {
  StudyGrid grid = tiny_study();
  grid.seeds = 1;
  Watcher first, second;
  EXPECT_EQ(run(grid, "first", first), RunEnd::finished);
  auto json = nlohmann::ordered_json::parse(read_file(folder_ / "first/results.json"));
  const std::string best = json["table"][0]["best_cell"];
  for (auto& cell : json["cells"]) {
    if (cell["name"] == best) cell["lengths"].clear();
  }
  write_file(folder_ / "known.json", json.dump());
  Study::Options options = in("second");
  options.known = folder_ / "known.json";
  Watcher cut;
  cut.stop_after_rows = 2;
  EXPECT_EQ(Study(grid, options).run(cut), RunEnd::stopped);
  Study study(grid, options);
  EXPECT_EQ(study.run(second), RunEnd::finished);
  ASSERT_EQ(second.jobs.size(), 1u);
  EXPECT_EQ(second.jobs[0].kind, StudyJob::Kind::try_lengths);
  EXPECT_EQ(cut.rows + second.rows, grid.steps);
  EXPECT_EQ(study.results().at(best).lengths.size(), 1u);
}

TEST_F(StudyRuns, RunsSideBySideGiveTheSame) {
  StudyGrid grid = tiny_study();
  grid.systems = {"mamba3", "mamba2"};
  Watcher one, many;
  EXPECT_EQ(run(grid, "one", one), RunEnd::finished);
  EXPECT_EQ(run(grid, "many", many, /*parallel=*/5), RunEnd::finished);
  EXPECT_EQ(many.jobs.size(), one.jobs.size());
  EXPECT_EQ(results_without_times(folder_ / "one"), results_without_times(folder_ / "many"));
}

TEST_F(StudyRuns, ACellThatDivergesIsAResult) {
  StudyGrid grid = tiny_study();
  grid.lr = {1e-3, 1e30};
  grid.steps = 40;
  grid.val_every = 1;
  Watcher watcher;
  Study study(grid, in("study"));
  EXPECT_EQ(study.run(watcher), RunEnd::finished);
  const CellResult& result = study.results().at("parity/mamba3/d16-lr1e+30-seed0");
  EXPECT_TRUE(result.diverged);
  EXPECT_LT(result.updates, 40);
  EXPECT_EQ(study_table(grid, study.results())[0].diverged, 1);
  EXPECT_FALSE(study.results().at("parity/mamba3/d16-lr0.001-seed0").diverged);
}

// A model that has learnt its task: made by hand, since tests have no time to train one.
TEST_F(StudyRuns, WhatSolvesTheTaskIsTriedOnLongerSequencesToo) {
  StudyGrid grid = tiny_study();
  grid.seeds = 1;
  Watcher watcher;
  EXPECT_EQ(run(grid, "study", watcher), RunEnd::finished);
  const StudyResults found = read_results(grid, folder_ / "study");
  const StudyCell best = *best_cell(grid, found, "parity", "mamba3");
  CellResult solved = found.at(best.name());
  solved.best = 0.95;
  EXPECT_EQ(solved.lengths.size(), 1u);
  solved.lengths.clear();
  write_file(folder_ / "study/cells" / best.name() / "result.json",
             to_json(best, settings_of(grid, best), solved));
  Watcher again;
  Study study(grid, in("study"));
  EXPECT_EQ(study.run(again), RunEnd::finished);
  ASSERT_EQ(again.jobs.size(), 1u);
  EXPECT_EQ(again.jobs[0], (StudyJob{StudyJob::Kind::try_lengths, best}));
  const CellResult& result = study.results().at(best.name());
  ASSERT_EQ(result.lengths.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(result.lengths[i].length, grid.other_lengths()[i]);
    EXPECT_EQ(result.lengths[i].count, kTriedCount);
    EXPECT_LE(std::abs(result.lengths[i].accuracy), 1);
  }
  EXPECT_EQ(result.best, 0.95);
  EXPECT_EQ(result.updates, found.at(best.name()).updates);
  EXPECT_EQ(
      to_json(best, settings_of(grid, best), read_results(grid, folder_ / "study")[best.name()]),
      to_json(best, settings_of(grid, best), result));
}

TEST_F(StudyRuns, WhatIsInTheFolderMustBeOfThisStudy) {
  StudyGrid grid = tiny_study();
  Watcher cut;
  cut.stop_after_rows = 2;
  EXPECT_EQ(run(grid, "study", cut), RunEnd::stopped);
  StudyGrid other = grid;
  other.steps += 1;
  Watcher watcher;
  const std::string cell = (folder_ / "study/cells/parity/mamba3/d16-lr0.001-seed0").string();
  EXPECT_EQ(
      input_error_of([&] { run(other, "study", watcher); }),
      cell + " holds a run of other settings than those of this study: choose another folder");
  EXPECT_EQ(run(grid, "study", watcher), RunEnd::finished);
  EXPECT_EQ(input_error_of([&] { run(other, "study", watcher); }),
            cell +
                "/result.json is of other settings than those of this study: choose another "
                "folder");
  StudyGrid wider = grid;  // but a grid may grow
  wider.lr.push_back(5e-3);
  Watcher more;
  EXPECT_EQ(run(wider, "study", more), RunEnd::finished);
  EXPECT_GE(more.jobs.size(), 1u);
  EXPECT_LE(more.jobs.size(), 3u + 3);
}

TEST_F(StudyRuns, FoldersThatCannotBeUsed) {
  write_file(folder_ / "file", "");
  Watcher watcher;
  EXPECT_EQ(error_of([&] { run(tiny_study(), "file/study", watcher); }).substr(0, 22),
            "cannot make the folder");
  EXPECT_EQ(input_error_of([&] { run(tiny_study(), "study", watcher, /*parallel=*/0); }),
            "--parallel must be at least 1, got 0");
  // The reports cannot be written while the study runs: it ends, the runs that were under way
  // saved.
  class Vandal final : public Watcher {
   public:
    explicit Vandal(std::filesystem::path study) : study_(std::move(study)) {}
    void on_row(const StudyCell&, const MetricsRow&) override {
      std::filesystem::remove(study_ / "results.json");
      std::filesystem::create_directories(study_ / "results.json" / "x");
    }

   private:
    std::filesystem::path study_;
  };
  Vandal vandal(folder_ / "spoilt");
  EXPECT_NE(
      error_of([&] { run(tiny_study(), "spoilt", vandal, /*parallel=*/2); }).find("results.json"),
      std::string::npos);
}

}  // namespace
}  // namespace mamba3
