#include "train/study_run.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "core/error.h"
#include "formats/text_file.h"
#include "model/checkpoint.h"
#include "train/evaluate.h"
#include "train/study_report.h"

namespace mamba3 {

namespace {

namespace fs = std::filesystem;

fs::path folder_of_cell(const fs::path& study, const StudyCell& cell) {
  return study / "cells" / cell.name();
}

// What the metrics of a run say about it.
CellResult read_metrics(const fs::path& path, const Task& task) {
  CellResult result;
  std::ifstream in(path);
  std::optional<double> best;
  for (std::string line; std::getline(in, line);) {
    const auto row = nlohmann::json::parse(line);
    result.updates = row.at("step").get<int64_t>();
    result.seconds = row.at("seconds").get<double>();
    if (!row.contains("accuracy")) continue;
    result.last = scaled_accuracy(task, row.at("accuracy").get<double>());
    best = std::max(best.value_or(result.last), result.last);
  }
  result.best = best.value_or(0);
  return result;
}

}  // namespace

// Passes what a run of a cell says on to the study's observer, one thread at a time.
class Study::Watch final : public RunObserver {
 public:
  Watch(Study& study, const StudyCell& cell, StudyObserver& observer)
      : study_(study), cell_(cell), observer_(observer) {}

  void on_row(const MetricsRow& row) override {
    const std::lock_guard lock(study_.mutex_);
    observer_.on_row(cell_, row);
  }
  bool stop() override {
    const std::lock_guard lock(study_.mutex_);
    study_.stopping_ = study_.stopping_ || observer_.stop();
    return study_.stopping_;
  }

 private:
  Study& study_;
  const StudyCell& cell_;
  StudyObserver& observer_;
};

StudyResults read_results(const StudyGrid& grid, const fs::path& folder, const fs::path& known) {
  StudyResults results, earlier;
  if (!known.empty()) earlier = parse_results(read_text_file(known), grid, known.string());
  const auto read = [&](const StudyCell& cell) {
    const fs::path file = folder_of_cell(folder, cell) / "result.json";
    if (!folder.empty() && fs::exists(file)) {
      results[cell.name()] =
          parse_result(read_text_file(file), settings_of(grid, cell), file.string());
    } else if (const auto found = earlier.find(cell.name()); found != earlier.end()) {
      results.insert(*found);
    }
  };
  for (const std::string& task : grid.tasks) {
    for (const std::string& system : grid.systems) {
      for (const StudyCell& cell : grid_cells(grid, task, system)) read(cell);
      // Other seeds count for the best only, which in a grid that is not finished may change.
      const std::optional<StudyCell> best = best_cell(grid, results, task, system);
      if (!best) continue;
      for (const StudyCell& cell : seed_cells(grid, *best)) read(cell);
    }
  }
  return results;
}

Study::Study(const StudyGrid& grid, const Options& options) : grid_(grid), options_(options) {
  grid_.check();
  if (options_.parallel < 1) {
    input_error("--parallel must be at least 1, got {}", options_.parallel);
  }
  results_ = read_results(grid_, options_.folder, options_.known);
  std::error_code failure;
  fs::create_directories(options_.folder, failure);
  if (failure) {
    error("cannot make the folder {}: {}", options_.folder.string(), failure.message());
  }
}

fs::path Study::folder_of(const StudyCell& cell) const {
  return folder_of_cell(options_.folder, cell);
}

RunEnd Study::run(StudyObserver& observer) {
  stopping_ = false;
  failure_ = nullptr;
  write_reports(options_.folder, grid_, results_);
  std::vector<std::thread> workers;
  for (int i = 1; i < options_.parallel; ++i) workers.emplace_back([&] { work(observer); });
  work(observer);
  for (std::thread& worker : workers) worker.join();
  if (failure_) std::rethrow_exception(failure_);
  return due_jobs(grid_, results_).empty() ? RunEnd::finished : RunEnd::stopped;
}

// The first that is due and not under way.
std::optional<StudyJob> Study::next_job() const {
  for (StudyJob& job : due_jobs(grid_, results_)) {
    if (!running_.contains(job.cell.name())) return std::move(job);
  }
  return std::nullopt;
}

// Takes jobs until none is left, or until it is time to stop. What one worker finishes may make new
// jobs due, so a worker without one waits for the others.
void Study::work(StudyObserver& observer) {
  std::unique_lock lock(mutex_);
  while (!stopping_ && !(stopping_ = observer.stop())) {
    const std::optional<StudyJob> job = next_job();
    if (!job && running_.empty()) break;
    if (!job) {
      changed_.wait(lock);
      continue;
    }
    running_.insert(job->cell.name());
    lock.unlock();
    std::optional<CellResult> result;
    std::exception_ptr failure;
    try {
      result = run_job(*job, observer);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    running_.erase(job->cell.name());
    try {
      if (failure) std::rethrow_exception(failure);
      if (result) {
        results_[job->cell.name()] = *result;
        write_reports(options_.folder, grid_, results_);
        observer.on_result(*job, *result);
      }
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
      stopping_ = true;
    }
    changed_.notify_all();
  }
}

// None when the run was stopped.
std::optional<CellResult> Study::run_job(const StudyJob& job, StudyObserver& observer) {
  const StudyCell& cell = job.cell;
  std::optional<CellResult> result;
  // A model whose result was known from elsewhere is made again before it is tried: a run without a
  // result of its own is one that was cut.
  const fs::path file = folder_of(cell) / "result.json";
  if (job.kind == StudyJob::Kind::train || !fs::exists(file) || !has_run(folder_of(cell))) {
    result = train(cell, observer);
  } else {
    const std::unique_lock lock(mutex_);
    result = results_.at(cell.name());
  }
  if (result && job.kind == StudyJob::Kind::try_lengths) result = try_lengths(cell, *result);
  if (result) {
    write_text_file(file, to_json(cell, settings_of(grid_, cell), *result) + "\n");
  }
  return result;
}

std::optional<CellResult> Study::train(const StudyCell& cell, StudyObserver& observer) {
  const TrainSettings settings = settings_of(grid_, cell);
  const fs::path folder = folder_of(cell);
  const TrainingRun::Options options{
      .folder = folder, .threads = options_.threads, .placement = options_.placement};
  const std::unique_ptr<TrainingRun> run = has_run(folder) ? TrainingRun::resume({}, {}, options)
                                                           : TrainingRun::begin(settings, options);
  if (to_json(run->settings()) != to_json(settings)) {
    input_error("{} holds a run of other settings than those of this study: choose another folder",
                folder.string());
  }
  Watch watch(*this, cell, observer);
  bool diverged = false;
  try {
    if (run->run(watch) == RunEnd::stopped) return std::nullopt;
  } catch (const DivergedError&) {
    diverged = true;
  }
  CellResult result = read_metrics(folder / "metrics.jsonl", *make_task(cell.task));
  result.diverged = diverged;
  result.device = name_of(options_.placement.device);
  result.dtype = name_of(options_.placement.dtype);
  return result;
}

CellResult Study::try_lengths(const StudyCell& cell, CellResult result) const {
  const Checkpoint checkpoint = load_checkpoint(folder_of(cell));
  Context ctx(options_.threads, options_.placement.device);
  const LanguageModel model = place_language_model(
      ctx, make_language_model(checkpoint.config, checkpoint.tensors), options_.placement.dtype);
  const std::unique_ptr<Task> task = make_task(cell.task);
  for (const int64_t length : lengths_to_try(grid_, result)) {
    const Evaluation found = evaluate_length(ctx, model, *task, length, kTriedCount);
    result.lengths.push_back({.length = length,
                              .count = found.scored,
                              .accuracy = scaled_accuracy(*task, found.accuracy())});
  }
  return result;
}

}  // namespace mamba3
