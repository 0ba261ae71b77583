// mamba3 study: experiments of the paper, each with all that it compares.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/progress.h"
#include "cli/stop_signal.h"
#include "core/error.h"
#include "train/study_report.h"
#include "train/study_run.h"

namespace mamba3::cli {

namespace {

// So many small models fill a GPU better than one.
constexpr int kParallelOnGpu = 8;

struct Options {
  std::string folder, known;
  std::string device = "auto";
  std::string dtype = "f32";  // bf16 has too few digits for a state that must be exact
  int threads = 0, parallel = 0;
  bool reduced = false, list = false;
  StudyGrid flags;  // what was given; the rest is empty or 0
};

// Shows a study on stderr: a progress bar, and a line for each result.
class Screen final : public StudyObserver {
 public:
  explicit Screen(const Study& study)
      : study_(study),
        state_(progress_of(study.grid(), study.results())),
        first_(state_.updates_done),
        progress_("study", "updates", first_ + state_.updates_left, first_) {}

  void on_row(const StudyCell& cell, const MetricsRow& row) override {
    ++made_;
    Running& now = running_[cell.name()];
    now.step = row.step;
    if (row.accuracy) {
      const auto [task, fresh] = tasks_.try_emplace(cell.task);
      if (fresh) task->second = make_task(cell.task);
      now.accuracy = fmt::format(" {:.1f}%", 100 * scaled_accuracy(*task->second, *row.accuracy));
    }
    draw();
  }

  void on_result(const StudyJob& job, const CellResult& result) override {
    running_.erase(job.cell.name());
    state_ = progress_of(study_.grid(), study_.results());
    progress_.hide();
    fmt::print(stderr, "{}  {}\n", job.cell.name(),
               job.kind == StudyJob::Kind::train ? of_training(result) : of_lengths(result));
    draw();
  }

  bool stop() override { return stop_asked(); }

  void finish() { progress_.finish(); }

  static std::string of_training(const CellResult& result) {
    return fmt::format("{:.2f}%  {} after {} updates, {}", 100 * result.best,
                       result.diverged ? "diverged" : "ended", result.updates,
                       clock_time(result.seconds));
  }

 private:
  struct Running {
    int64_t step = 0;
    std::string accuracy;  // of the last validation
  };

  static std::string of_lengths(const CellResult& result) {
    std::vector<std::string> parts;
    for (const LengthResult& l : result.lengths) {
      parts.push_back(fmt::format("length {}: {:.2f}%", l.length, 100 * l.accuracy));
    }
    return fmt::format("{}", fmt::join(parts, "  "));
  }

  void draw() {
    int64_t left = state_.updates_left;
    for (const auto& [name, run] : running_) left -= run.step;
    progress_.set_total(first_ + made_ + std::max<int64_t>(left, 0));
    progress_.update(first_ + made_, detail());
  }

  // The cells that are finished, and each second another of those that run.
  std::string detail() const {
    const std::string cells = fmt::format("cells {}/{}", state_.cells_done, state_.cells);
    if (running_.empty()) return cells;
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(
        std::chrono::steady_clock::now().time_since_epoch());
    const auto& [name, run] = *std::next(running_.begin(), seconds.count() % std::ssize(running_));
    return fmt::format("{}  {} step {}{}", cells, name, run.step, run.accuracy);
  }

  const Study& study_;
  StudyProgress state_;
  int64_t first_, made_ = 0;
  Progress progress_;
  std::map<std::string, Running> running_;
  std::map<std::string, std::unique_ptr<Task>> tasks_;
};

StudyGrid grid_of(const Options& options) {
  StudyGrid grid = options.reduced ? reduced_study() : full_study();
  const StudyGrid& given = options.flags;
  if (!given.tasks.empty()) grid.tasks = given.tasks;
  if (!given.systems.empty()) grid.systems = given.systems;
  if (!given.d_model.empty()) grid.d_model = given.d_model;
  if (!given.lr.empty()) grid.lr = given.lr;
  for (int64_t StudyGrid::*member : {&StudyGrid::seeds, &StudyGrid::steps, &StudyGrid::batch}) {
    if (given.*member > 0) grid.*member = given.*member;
  }
  grid.check();
  return grid;
}

// The cells of the grid, and those beyond it that are known by now.
void list(const Options& options) {
  const StudyGrid grid = grid_of(options);
  const StudyResults results = read_results(grid, options.folder, options.known);
  for (const std::string& task : grid.tasks) {
    for (const std::string& system : grid.systems) {
      for (const StudyCell& cell : grid_cells(grid, task, system)) {
        const auto found = results.find(cell.name());
        fmt::print("{}{}\n", cell.name(),
                   found == results.end() ? "" : "  " + Screen::of_training(found->second));
      }
    }
  }
  fmt::print("and the best of each task and system with {} seeds in all: {} runs\n", grid.seeds,
             progress_of(grid, results).cells);
}

void run(const Options& options) {
  if (options.list) return list(options);
  if (options.folder.empty()) input_error("name the folder of the study: --output DIR");
  const StudyGrid grid = grid_of(options);
  const Placement placement = parse_placement(options.device, options.dtype);
  const bool on_gpu = placement.device == Device::cuda;
  const int parallel = options.parallel > 0 ? options.parallel : on_gpu ? kParallelOnGpu : 1;
  const int threads = on_gpu ? 1 : std::max(1, ThreadPool(options.threads).size() / parallel);
  catch_stop_signals();
  Study study(grid, {.folder = options.folder,
                     .known = options.known,
                     .parallel = parallel,
                     .threads = threads,
                     .placement = placement});
  Screen screen(study);
  const RunEnd end = study.run(screen);
  screen.finish();
  if (end == RunEnd::stopped) {
    fmt::print(stderr, "stopped and saved; the same command continues the study in {}\n",
               options.folder);
    end_by_stop_signal();
  }
  fmt::print("{}", results_markdown(grid, study.results()));
}

void add_state_tracking(CLI::App& study) {
  CLI::App* command = study.add_subcommand(
      "state-tracking",
      "Table 5b: parity and modular arithmetic, by Mamba-3, its ablations, Mamba-2 and Gated "
      "DeltaNet, over a grid of widths and learning rates. Ctrl-C saves and stops (exit code 130); "
      "the same command continues.");
  const auto options = std::make_shared<Options>();
  options->flags.seeds = options->flags.steps = options->flags.batch = 0;
  command->add_option("-o,--output", options->folder, "Folder of the runs and the results")
      ->type_name("DIR");
  command
      ->add_option("--known", options->known,
                   "results.json of an earlier study: its cells of the same settings are not "
                   "trained again")
      ->type_name("FILE");
  command->add_flag("--reduced", options->reduced,
                    "A small grid with short sequences: minutes on a laptop");
  command->add_flag("--list", options->list, "List the cells of the grid, and run nothing");
  std::vector<std::string> systems, tasks;
  for (const StudySystem& system : study_systems()) systems.push_back(system.name);
  for (const StudyTask& task : study_tasks()) tasks.push_back(task.name);
  const auto list_option = [&](const char* flag, auto& member, const std::string& help) {
    command->add_option(flag, member, help)->delimiter(',');
  };
  list_option("--task", options->flags.tasks,
              fmt::format("Only these tasks of {}", fmt::join(tasks, ", ")));
  list_option("--system", options->flags.systems,
              fmt::format("Only these systems of {}", fmt::join(systems, ", ")));
  list_option("--d-model", options->flags.d_model, "These widths instead of the grid's");
  list_option("--lr", options->flags.lr, "These learning rates instead of the grid's");
  const auto number_option = [&](const char* flag, int64_t& member, const char* help) {
    command->add_option(flag, member, help)
        ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
        ->type_name("N");
  };
  number_option("--seeds", options->flags.seeds, "Seeds of the best setting");
  number_option("--steps", options->flags.steps, "Updates of a run instead of the task's");
  number_option("--batch", options->flags.batch, "Sequences of an update");
  command
      ->add_option("--parallel", options->parallel,
                   "Runs side by side; 0: 8 on the GPU, 1 on the CPU, which share the threads")
      ->check(CLI::Range(0, 256))
      ->type_name("N")
      ->capture_default_str();
  add_device_options(*command, options->device, options->dtype, options->threads);
  command->callback([options] { run(*options); });
}

}  // namespace

void add_study(CLI::App& app) {
  CLI::App* study = app.add_subcommand("study", "Repeat an experiment of the paper");
  study->require_subcommand(1);
  add_state_tracking(*study);
}

}  // namespace mamba3::cli
