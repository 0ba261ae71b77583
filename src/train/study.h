#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "train/settings.h"

namespace mamba3 {

// The study of state tracking (paper, section 4.3 and table 5b): systems that differ in their mixer
// learn tasks that need a state, each at every width and learning rate of a grid; the best setting
// of each system is then trained with more seeds, and its models are tried on sequences of other
// lengths. This file is the study as data and pure functions; study_run.h runs it, study_report.h
// writes what came out.
//
// Every accuracy of the study is scaled: 0 is guessing, 1 is all right (scaled_accuracy()).

// What is compared.
struct StudySystem {
  const char* name;                // of the flag and in files
  const char* title;               // for people
  void (*change)(TrainSettings&);  // how it differs from Mamba-3
};
const std::vector<StudySystem>& study_systems();

// How long the sequences of a run are, as the flags of `mamba3 train`.
struct StudyCurriculum {
  int64_t shortest = 0, min_length = 3;
  double growth = 0;
};

struct StudyTask {
  const char* name;  // of make_task()
  const char* title;
  int64_t layers;
  int64_t steps;  // updates of a run
  StudyCurriculum curriculum;
};
const std::vector<StudyTask>& study_tasks();

// Those of a name. Throw InputError that lists the names.
const StudySystem& study_system(std::string_view name);
const StudyTask& study_task(std::string_view name);

// What table 5b says; absent for a system that it has not.
std::optional<double> paper_accuracy(std::string_view task, std::string_view system);

struct StudyGrid {
  std::vector<std::string> tasks, systems;
  std::vector<int64_t> d_model;
  std::vector<double> lr;
  int64_t seeds = 3;  // with which the best setting is trained in all; the grid has the first
  int64_t d_state = 64, headdim = 32;
  int64_t batch = 256;
  int64_t steps = 0;  // updates of a run; 0: as the task has it
  int64_t max_length = 160;
  std::optional<StudyCurriculum> arithmetic;  // instead of that of both its tasks
  int64_t val_length = 256, val_rows = 2048, val_every = 200;

  int64_t steps_of(std::string_view task) const;
  // Throws InputError for what cannot be trained, or is there twice.
  void check() const;
  // What models are tried on, in ascending order: val_length / 16, / 8, / 4 and / 2, as far as
  // there are sequences so short, and 2, 4 and 16 times val_length.
  std::vector<int64_t> other_lengths() const;
};
StudyGrid full_study();     // as the paper's
StudyGrid reduced_study();  // minutes on a laptop

// One training run.
struct StudyCell {
  std::string task, system;
  int64_t d_model = 0;
  double lr = 0;
  uint64_t seed = 0;

  // "parity/mamba3/d32-lr0.001-seed0", which is also its folder in the folder of the study.
  std::string name() const;
  bool operator==(const StudyCell&) const = default;
};

TrainSettings settings_of(const StudyGrid& grid, const StudyCell& cell);

struct LengthResult {
  int64_t length = 0, count = 0;  // of so many sequences
  double accuracy = 0;            // scaled
};

// What came out of a cell.
struct CellResult {
  double best = 0, last = 0;  // scaled accuracy: the best validation of the run, and its last one
  int64_t updates = 0;
  double seconds = 0;
  bool diverged = false;  // ended by updates that were not finite: the accuracies are from before
  std::string device, dtype;
  std::vector<LengthResult> lengths;  // of the last model, tried on lengths_to_try()
};
using StudyResults = std::map<std::string, CellResult>;  // by the name of the cell

// The record of a finished cell: the cell, its result, and all its settings, as one JSON object.
std::string to_json(const StudyCell& cell, const TrainSettings& settings, const CellResult& result);
// The result of such a record. Throws InputError, naming `source`, when it is damaged or of other
// settings.
CellResult parse_result(std::string_view json, const TrainSettings& settings,
                        std::string_view source);

// The results of those cells of a results.json (study_report.h) that are cells of the grid with the
// settings of the grid, other seeds included. Throws InputError, naming `source`, when it is
// damaged.
StudyResults parse_results(std::string_view json, const StudyGrid& grid, std::string_view source);

bool all_finished(const StudyResults& results, const std::vector<StudyCell>& cells);

// The cells of the grid of a task and a system, with the first seed.
std::vector<StudyCell> grid_cells(const StudyGrid& grid, std::string_view task,
                                  std::string_view system);
// Of those that are finished the best: the largest `best`, then the largest `last`, then the fewest
// updates, then the first. None when none is finished.
std::optional<StudyCell> best_cell(const StudyGrid& grid, const StudyResults& results,
                                   std::string_view task, std::string_view system);
// The cell of the same setting with each seed, itself included.
std::vector<StudyCell> seed_cells(const StudyGrid& grid, const StudyCell& cell);
// Of an even number of values the mean of the middle two. There must be one.
double median(std::vector<double> values);

// A model solves its task from this accuracy on.
inline constexpr double kSolved = 0.9;
// Those of other_lengths() that say something of a model: one that does not solve its task is tried
// on shorter sequences only.
std::vector<int64_t> lengths_to_try(const StudyGrid& grid, const CellResult& result);
inline constexpr int64_t kTriedCount = 256;  // sequences of a length

// What is to be done.
struct StudyJob {
  enum class Kind : uint8_t { train, try_lengths };
  Kind kind = Kind::train;
  StudyCell cell;
  bool operator==(const StudyJob&) const = default;
};
// All jobs that can begin, given what is finished: cells of the grid; once those of a task and
// system are finished, the other seeds of its best setting; and then the trials on other
// lengths. Nothing is left when there are none.
std::vector<StudyJob> due_jobs(const StudyGrid& grid, const StudyResults& results);

// How far the study is, in training runs and their updates. A run may end early, so what is left is
// an upper bound.
struct StudyProgress {
  int64_t cells = 0, cells_done = 0;
  int64_t updates_done = 0, updates_left = 0;
};
StudyProgress progress_of(const StudyGrid& grid, const StudyResults& results);

// The median accuracy of so many models at a length.
struct LengthMedian {
  int64_t length = 0, models = 0;
  double accuracy = 0;
};

// A row of the table: a task and a system.
struct StudyRow {
  std::string task, system;
  std::optional<double> paper;
  int64_t cells = 0, cells_done = 0, diverged = 0;  // of the grid
  std::optional<StudyCell> best_cell;               // so far
  double best = 0;                                  // its accuracy
  std::optional<double> median;                     // of the seeds, once all are finished
  std::vector<LengthMedian> by_length;              // those seeds' models, tried
};
std::vector<StudyRow> study_table(const StudyGrid& grid, const StudyResults& results);

}  // namespace mamba3
