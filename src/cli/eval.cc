// mamba3 eval: how well a model does a task.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/progress.h"
#include "core/error.h"
#include "model/checkpoint.h"
#include "train/evaluate.h"

namespace mamba3::cli {

namespace {

struct Options {
  std::string folder;
  std::string decay = "auto";
  int threads = 0;
  std::string task;
  std::vector<int64_t> lengths = {256};
  int64_t count = 1024;
  bool json = false;
};

// Tokens that run at once: enough to keep the machine busy, few enough to stay in its caches.
constexpr int64_t kTokensAtOnce = 8192;

Evaluation evaluate_length(Context& ctx, const LanguageModel& model, const Task& task,
                           int64_t length, int64_t count, Progress& progress, int64_t& done) {
  const TaskSource source(task, {.length = {.first = length, .last = length},
                                 .validation_length = length,
                                 .validation_rows = count});
  const int64_t rows = std::max<int64_t>(1, kTokensAtOnce / length);
  const NamedTensors activations =
      allocate(activation_table(model.config, rows * length, Keep::nothing));
  Evaluation total;
  Batch batch;
  for (int64_t first = 0; first < count; first += rows) {
    const int64_t n = std::min(rows, count - first);
    source.validate(first, n, batch);
    total += evaluate(ctx, model, activations, batch, /*count_correct=*/true);
    progress.update(done += n);
  }
  return total;
}

void print(const Options& options, const Task& task, int64_t length, const Evaluation& result) {
  const double scaled = scaled_accuracy(task, result.accuracy());
  if (options.json) {
    const nlohmann::ordered_json json = {
        {"task", task.name()},           {"length", length},          {"count", result.scored},
        {"accuracy", result.accuracy()}, {"scaled_accuracy", scaled}, {"loss", result.loss()}};
    fmt::print("{}\n", json.dump());
  } else {
    fmt::print("{}  length {}  accuracy {:.2f}%  scaled {:.2f}%  ({} of {})\n", task.name(), length,
               100 * result.accuracy(), 100 * scaled, result.correct, result.scored);
  }
}

void run(const Options& options) {
  const std::unique_ptr<Task> task = make_task(options.task);
  const Checkpoint checkpoint = load_checkpoint(options.folder, options.decay);
  for (const std::string& warning : checkpoint.warnings) {
    fmt::print(stderr, "mamba3: warning: {}\n", warning);
  }
  const LanguageModel model = make_language_model(checkpoint.config, checkpoint.tensors);
  if (model.config.vocab < task->vocab()) {
    input_error("{} has {} ids, but {} needs {}", options.folder, model.config.vocab, task->name(),
                task->vocab());
  }
  Context ctx(options.threads);
  Progress progress("eval", "sequences", options.count * std::ssize(options.lengths));
  int64_t done = 0;
  std::vector<Evaluation> results;
  for (const int64_t length : options.lengths) {
    results.push_back(evaluate_length(ctx, model, *task, length, options.count, progress, done));
  }
  progress.finish();
  for (size_t i = 0; i < results.size(); ++i) print(options, *task, options.lengths[i], results[i]);
}

}  // namespace

void add_eval(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Measure the accuracy of a model at a task");
  const auto options = std::make_shared<Options>();
  command->add_option("-m,--model", options->folder, "Folder of the model")
      ->required()
      ->type_name("DIR");
  command->add_option("--decay", options->decay, "heavy_tail, softplus, or auto, by the layout")
      ->check(CLI::IsMember({"auto", "heavy_tail", "softplus"}))
      ->type_name("NAME")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads; 0: as many as there are CPUs")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--task", options->task, "The task: parity")->required()->type_name("NAME");
  command->add_option("--length", options->lengths, "Length of the sequences; several: 256,512")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--count", options->count, "Number of sequences of each length")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print a JSON object a line");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
