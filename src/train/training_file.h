#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include "train/settings.h"
#include "train/trainer.h"

namespace mamba3 {

// How far a run is.
struct RunPosition {
  int64_t step = 0;     // updates tried; the next batch is of this step
  int64_t tokens = 0;   // trained on
  int64_t solved = 0;   // updates with a loss below --growth-loss: how far the curriculum is
  double seconds = 0;   // spent training
  double accuracy = 0;  // of the last validation, for a task
};

// All that continuing a run needs. Random numbers and the place in the data follow from the seed
// and the step.
struct SavedRun {
  TrainSettings settings;
  Config config;
  RunPosition position;
  uint64_t fingerprint = 0;  // of the corpus; 0 for a task
  Trainer::State state;
};

// Whether the folder holds a run.
bool has_run(const std::filesystem::path& folder);

// Writes training.safetensors, and the same weights as a checkpoint beside it. training.safetensors
// is complete in itself (weights, moments, position and settings in one file), so a run continues
// from one consistent state wherever the writing was cut; and nothing is replaced before everything
// is on the disk. Throws Error if it cannot be written: the old files are whole then.
void save_run(const std::filesystem::path& folder, const SavedRun& run);

// Throws InputError when the folder has no run or its file is damaged.
SavedRun load_run(const std::filesystem::path& folder);

// Of the run in the folder; none when there is no run. Throws InputError when its file is damaged.
std::optional<TrainSettings> read_run_settings(const std::filesystem::path& folder);

}  // namespace mamba3
