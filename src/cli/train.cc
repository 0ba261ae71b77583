// mamba3 train: train a model on text or on a task.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/progress.h"
#include "cli/stop_signal.h"
#include "train/run.h"

namespace mamba3::cli {

namespace {

struct Options {
  TrainSettings settings;
  TrainingRun::Options run;
  std::string device = "auto", dtype = "auto";
  std::string folder;
  bool resume = false;
  bool json = false;
  std::vector<std::pair<std::string, const CLI::Option*>> flags;  // of the settings, by name

  std::vector<std::string> given() const {
    std::vector<std::string> names;
    for (const auto& [name, option] : flags) {
      if (option->count() > 0) names.push_back(name);
    }
    return names;
  }
};

// Shows a run on stderr: a progress bar, and a line for each validation and sample.
class Screen final : public RunObserver {
 public:
  explicit Screen(const TrainingRun& run)
      : run_(run), begin_(run.position()), progress_("train", "tokens", 0, begin_.tokens) {}

  void on_row(const MetricsRow& row) override {
    last_ = row;
    if (row.skipped) {
      say(fmt::format("step {}: loss or gradient not finite, update skipped", row.step));
    }
    if (row.val_loss) say(fmt::format("step {:>6}  {}", row.step, validation(row)));
    if (row.sample) say(fmt::format("--- sample at step {}\n{}\n---", row.step, *row.sample));
    // Exact for a text; an estimate where the length of a step or the speed decides.
    const double total = static_cast<double>(row.tokens) / run_.progress();
    progress_.set_total(std::llround(total));
    progress_.update(row.tokens, fmt::format("step {}  loss {:.3f}", row.step, row.loss));
  }

  bool stop() override { return stop_asked(); }

  void finish() { progress_.finish(); }
  const std::optional<MetricsRow>& last() const { return last_; }

  // With all that is done between them. There was at least one.
  std::string steps_per_second() const {
    const double seconds = last_->seconds - begin_.seconds;
    return short_count(static_cast<double>(last_->step - begin_.step) / seconds);
  }

  static std::string validation(const MetricsRow& row) {
    std::string text = fmt::format("loss {:.4f}  validation {:.4f}", row.loss, *row.val_loss);
    if (row.bits_per_byte) text += fmt::format("  {:.4f} bits per byte", *row.bits_per_byte);
    if (row.accuracy) text += fmt::format("  accuracy {:.2f}%", 100 * *row.accuracy);
    return text;
  }

 private:
  void say(const std::string& line) {
    progress_.hide();
    fmt::print(stderr, "{}\n", line);
  }

  const TrainingRun& run_;
  RunPosition begin_;
  Progress progress_;
  std::optional<MetricsRow> last_;
};

std::unique_ptr<TrainingRun> prepare(const Options& options) {
  const std::vector<std::string> given = options.given();
  if (options.resume) return TrainingRun::resume(options.settings, given, options.run);
  const TrainSettings defaults = default_settings(options.settings.task, options.settings.mixer);
  return TrainingRun::begin(overlay(defaults, options.settings, given), options.run);
}

void describe(const TrainingRun& run) {
  for (const std::string& warning : run.warnings()) {
    fmt::print(stderr, "mamba3: warning: {}\n", warning);
  }
  const Config& c = run.config();
  const Config::Heads heads = c.heads();
  fmt::print(stderr, "{} parameters: {} layers, D {}",
             short_count(static_cast<double>(parameter_count(c))), c.n_layer, c.D);
  if (heads.H > 0) fmt::print(stderr, ", {} heads of {}, N {}", heads.H, heads.P, heads.N);
  fmt::print(stderr, "\n");
  const Corpus& corpus = run.corpus();
  if (corpus.documents > 0) {
    fmt::print(stderr, "{} files, {} bytes: {} tokens to train on, {} held out\n", corpus.documents,
               short_count(static_cast<double>(corpus.bytes)),
               short_count(static_cast<double>(corpus.train.size())),
               short_count(static_cast<double>(corpus.held_out.size())));
  }
  if (run.position().step > 0) {
    fmt::print(stderr, "continuing after step {}\n", run.position().step);
  }
}

void summarise(const Options& options, const Screen& screen) {
  const std::optional<MetricsRow>& last = screen.last();
  if (!last) {
    fmt::print("{}: nothing left to train\n", options.folder);
  } else if (options.json) {
    fmt::print("{}\n", to_json(*last));
  } else {
    const std::string result =
        last->val_loss ? Screen::validation(*last) : fmt::format("loss {:.4f}", last->loss);
    fmt::print("{}: step {}  {}  {} steps/s\n", options.folder, last->step, result,
               screen.steps_per_second());
  }
}

void run(Options& options) {
  options.run.folder = options.folder;
  options.run.placement = parse_placement(options.device, options.dtype);
  // From here on, so that a run is saved also if the signal comes while it is being prepared.
  catch_stop_signals();
  const std::unique_ptr<TrainingRun> training = prepare(options);
  describe(*training);
  Screen screen(*training);
  const RunEnd end = training->run(screen);
  screen.finish();
  if (end == RunEnd::stopped) {
    fmt::print(stderr,
               "stopped and saved after step {}; continue with: mamba3 train -o {} --resume\n",
               training->position().step, options.folder);
    end_by_stop_signal();
  }
  summarise(options, screen);
}

template <typename Member>
CLI::Option* add_setting(CLI::App& command, const SettingInfo& info, Member& member) {
  const std::string flag = fmt::format("--{}", info.name);
  if constexpr (std::is_same_v<Member, bool>) {
    return command.add_flag(flag, member, info.help);
  } else if constexpr (std::is_same_v<Member, std::vector<std::string>>) {
    // The text is what stands there without a flag.
    if (info.name == std::string_view("text")) {
      return command.add_option(info.name, member, info.help);
    }
    return command.add_option(flag, member, info.help)->delimiter(',')->capture_default_str();
  } else {
    return command.add_option(flag, member, info.help)->capture_default_str();
  }
}

}  // namespace

void add_train(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "train",
      "Train a model on text files, or on a task. Ctrl-C saves and stops (exit code 130), a second "
      "one stops at once.");
  const auto options = std::make_shared<Options>();
  command->add_option("-o,--output", options->folder, "Folder of the run and its checkpoint")
      ->required()
      ->type_name("DIR");
  command->add_flag("--resume", options->resume, "Continue the run in the folder");
  command->add_flag("--overwrite", options->run.overwrite, "Replace the run in the folder");
  add_device_options(*command, options->device, options->dtype, options->run.threads);
  command->add_flag("--json", options->json, "Print the last row of the metrics as JSON");
  visit_settings(options->settings, [&](const SettingInfo& info, auto& member) {
    CLI::Option* option = add_setting(*command, info, member)->group(info.group);
    options->flags.emplace_back(info.name, option);
  });
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
