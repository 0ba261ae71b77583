#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mamba3/error.h"
#include "train/corpus.h"
#include "train/metrics.h"
#include "train/settings.h"
#include "train/trainer.h"
#include "train/training_file.h"

namespace mamba3 {

// How a run talks to whoever started it.
class RunObserver {
 public:
  virtual ~RunObserver() = default;
  virtual void on_row(const MetricsRow& row) = 0;  // after each update
  virtual bool stop() = 0;                         // asked after each update
};

enum class RunEnd : uint8_t { finished, stopped };

// Several updates in a row were not finite: training on makes no sense.
class DivergedError : public Error {
 public:
  using Error::Error;
};

// A training run in a folder: data, model, optimiser, and the files
//   model.safetensors, config.json, tokenizer.json   the checkpoint, for every other command
//   training.safetensors                              all that continuing needs (training_file.h)
//   metrics.jsonl                                     one line an update
// The numbers of a run depend on its settings and data alone, except that one with --minutes moves
// its schedule with the clock. A run that was stopped, or killed and continued from its last
// checkpoint, makes the same numbers as one that was not.
class TrainingRun {
 public:
  struct Options {
    std::filesystem::path folder;
    int threads = 0;         // 0: as many as the process may use
    Placement placement;     // where to train; a run may change it when it is resumed
    bool overwrite = false;  // begin anew where a run exists
  };

  // Begins a run. Throws InputError when the folder holds one and `overwrite` is not set.
  static std::unique_ptr<TrainingRun> begin(const TrainSettings& settings, const Options& options);
  // Continues the run in the folder, with the named settings taken from `flags`: those that are
  // not fixed may change. Throws InputError when there is none, for a setting that is fixed, or
  // when the text is not the one that the run began with.
  static std::unique_ptr<TrainingRun> resume(const TrainSettings& flags,
                                             const std::vector<std::string>& names,
                                             const Options& options);

  // Trains to the end, or until the observer says stop, and leaves a checkpoint. Throws
  // DivergedError after several updates in a row that are not finite, Error when a file cannot be
  // written; the last checkpoint is whole then.
  RunEnd run(RunObserver& observer);

  const TrainSettings& settings() const { return saved_.settings; }
  const Config& config() const { return saved_.config; }
  const RunPosition& position() const { return saved_.position; }
  const Corpus& corpus() const { return corpus_; }                        // empty for a task
  const std::vector<std::string>& warnings() const { return warnings_; }  // for the caller to show
  double progress() const;  // the part of the run that is over

 private:
  TrainingRun(const Options& options, SavedRun saved);
  void read_data();
  void make_model();
  void make_folder();
  void prepare();
  double progress_after(int64_t step) const;
  double growth_after(int64_t step) const;
  void draw(int64_t step);
  MetricsRow step();
  void validate(MetricsRow& row);
  std::string sample();
  void save();

  Options options_;
  SavedRun saved_;
  Context context_;
  std::optional<Tokenizer> tokenizer_;
  std::unique_ptr<Task> task_;
  Corpus corpus_;
  std::unique_ptr<BatchSource> source_;
  double validation_bytes_ = 0;  // of the text that is scored; 0 for a task
  std::unique_ptr<Trainer> trainer_;
  std::unique_ptr<MetricsLog> log_;
  std::vector<Batch> batches_;
  int64_t drawn_ = -1;  // batches_ are those of the update after so many
  std::vector<std::string> warnings_;
  double seconds_before_ = 0;
};

}  // namespace mamba3
