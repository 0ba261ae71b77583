#pragma once

#include <condition_variable>
#include <exception>
#include <filesystem>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "train/run.h"
#include "train/study.h"

namespace mamba3 {

// How a study talks to whoever started it. Calls come from several threads, but one at a time.
class StudyObserver {
 public:
  virtual ~StudyObserver() = default;
  virtual void on_row(const StudyCell& cell, const MetricsRow& row) = 0;  // after each update
  // A cell has been trained, or tried on other lengths: it has a result, and the files of the
  // study know it.
  virtual void on_result(const StudyJob& job, const CellResult& result) = 0;
  virtual bool stop() = 0;  // asked after each update of each run
};

// The results of the cells that are finished in the folder of a study, which need not exist ("":
// none), and of those that are not there but in `known`, the results.json of an earlier study.
// Throws InputError for a record that is damaged, or in the folder and of other settings.
StudyResults read_results(const StudyGrid& grid, const std::filesystem::path& folder,
                          const std::filesystem::path& known = {});

// A study in a folder:
//   cells/NAME/            the training run of each cell (run.h), and its result.json
//   results.json, .md      all results and the table (study_report.h), rewritten after each cell
//   results.svg, lr.svg    the same as pictures
// What is finished there is not done again, and runs that were cut are continued, so a study that
// was stopped ends like one that was not. Several processes may work in one folder as long as their
// grids have no cell in common.
class Study {
 public:
  struct Options {
    std::filesystem::path folder;
    std::filesystem::path known = {};  // results.json whose cells are not trained again
    int parallel = 1;                  // runs side by side
    int threads = 1;                   // of each; 0: as many as the process may use
    Placement placement;
  };

  // Throws InputError for a grid or a folder that cannot be used.
  Study(const StudyGrid& grid, const Options& options);

  // Does what is due until nothing is, or until the observer says stop, which saves the runs that
  // are under way. A run that diverges is a result. Throws Error when a file cannot be written,
  // after the other runs were saved.
  RunEnd run(StudyObserver& observer);

  const StudyGrid& grid() const { return grid_; }
  const StudyResults& results() const { return results_; }

 private:
  class Watch;

  void work(StudyObserver& observer);
  std::optional<StudyJob> next_job() const;
  std::optional<CellResult> run_job(const StudyJob& job, StudyObserver& observer);
  std::optional<CellResult> train(const StudyCell& cell, StudyObserver& observer);
  CellResult try_lengths(const StudyCell& cell, CellResult result) const;
  std::filesystem::path folder_of(const StudyCell& cell) const;

  StudyGrid grid_;
  Options options_;
  std::mutex mutex_;  // of what follows, and of the observer
  std::condition_variable changed_;
  StudyResults results_;
  std::set<std::string> running_;  // names of cells
  bool stopping_ = false;
  std::exception_ptr failure_;
};

}  // namespace mamba3
