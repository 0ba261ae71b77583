// mamba3 eval: how well a model does a task.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/progress.h"
#include "core/error.h"
#include "infer/model_impl.h"
#include "train/evaluate.h"
#include "train/training_file.h"

namespace mamba3::cli {

namespace {

struct Options {
  ModelOptions model;
  std::string task;  // empty: that of the run
  std::optional<int64_t> symbols, pairs, copied;
  std::vector<int64_t> lengths = {256};
  int64_t count = 1024;
  bool json = false;
};

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

// The task of the flags. What they leave open is that of the run which made the model, if its
// folder holds one.
std::unique_ptr<Task> task_of(const Options& options) {
  const std::optional<TrainSettings> run = read_run_settings(options.model.folder);
  const std::string name = options.task.empty() && run ? run->task : options.task;
  if (name.empty()) {
    input_error("name the task, with --task: {} does not say what the model was trained on",
                options.model.folder);
  }
  TaskOptions measures = run ? run->task_measures() : TaskOptions{};
  measures.symbols = options.symbols.value_or(measures.symbols);
  measures.pairs = options.pairs.value_or(measures.pairs);
  measures.copied = options.copied.value_or(measures.copied);
  return make_task(name, measures);
}

void run(const Options& options) {
  const std::unique_ptr<Task> task = task_of(options);
  const Model loaded = load_model(options.model);
  const LanguageModel& model = loaded.impl().language_model;
  if (model.config.vocab < task->vocab()) {
    input_error("{} has {} ids, but {} needs {}", options.model.folder, model.config.vocab,
                task->name(), task->vocab());
  }
  Context ctx(options.model.threads, placement_of(model).device);
  Progress progress("eval", "sequences", options.count * std::ssize(options.lengths));
  int64_t done = 0;
  std::vector<Evaluation> results;
  for (const int64_t length : options.lengths) {
    results.push_back(evaluate_length(ctx, model, *task, length, options.count,
                                      [&](int64_t n) { progress.update(done += n); }));
  }
  progress.finish();
  for (size_t i = 0; i < results.size(); ++i) print(options, *task, options.lengths[i], results[i]);
}

}  // namespace

void add_eval(CLI::App& app) {
  CLI::App* command = app.add_subcommand("eval", "Measure the accuracy of a model at a task");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  add_device_options(*command, options->model.device, options->model.dtype, options->model.threads);
  command
      ->add_option("--task", options->task,
                   "The task: " + list_of_tasks() + "; without it, that of the model's training")
      ->type_name("NAME");
  const auto measure = [&](const char* flag, std::optional<int64_t>& member, const char* help) {
    command->add_option(flag, member, fmt::format("{}; without it, as in training", help))
        ->type_name("N");
  };
  measure("--symbols", options->symbols,
          "Keys of associative_recall, and values; alphabet of needle");
  measure("--pairs", options->pairs, "Pairs of a key and a value in associative_recall, at most");
  measure("--copied", options->copied, "Tokens to copy in needle");
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
