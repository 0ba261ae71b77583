#pragma once

#include <filesystem>
#include <string>

#include "train/study.h"

namespace mamba3 {

// The flags of `mamba3 train` that repeat a run of a task: what differs from default_settings().
std::string train_flags(const TrainSettings& settings);

// All that is known of a study: the grid, each finished cell with its settings, its result and the
// command that repeats it, and the table.
std::string results_json(const StudyGrid& grid, const StudyResults& results);

// The table beside the paper's, then that by length.
std::string results_markdown(const StudyGrid& grid, const StudyResults& results);

// Bars of accuracy by system for each task, the paper's and ours.
std::string results_svg(const StudyGrid& grid, const StudyResults& results);

// Accuracy over the learning rate, a line for each system and width, for each task.
std::string rates_svg(const StudyGrid& grid, const StudyResults& results);

// Writes the four as results.json, results.md, results.svg and lr.svg. Throws Error.
void write_reports(const std::filesystem::path& folder, const StudyGrid& grid,
                   const StudyResults& results);

}  // namespace mamba3
