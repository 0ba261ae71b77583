#include "cli/model_options.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

namespace mamba3::cli {

void add_model_options(CLI::App& command, ModelOptions& options) {
  command.add_option("-m,--model", options.folder, "Folder of the model: config.json and weights")
      ->required()
      ->type_name("DIR");
  command
      .add_option("--decay", options.decay,
                  "How the raw decay becomes A: heavy_tail (published checkpoints), softplus (fla "
                  "layout, older runs), auto (by the layout)")
      ->check(CLI::IsMember({"auto", "heavy_tail", "softplus"}))
      ->type_name("NAME")
      ->capture_default_str();
}

void add_tokenizer_option(CLI::App& command, ModelOptions& options) {
  command
      .add_option("--tokenizer", options.tokenizer,
                  "A tokenizer.json, or bytes, instead of the folder's own")
      ->type_name("FILE");
}

void add_threads_option(CLI::App& command, ModelOptions& options) {
  command.add_option("--threads", options.threads, "Threads; 0: as many as there are CPUs")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
}

Model load_model(const ModelOptions& options) {
  Model model =
      Model::load(options.folder, {.decay = options.decay, .tokenizer = options.tokenizer});
  for (const std::string& warning : model.info().warnings)
    fmt::print(stderr, "mamba3: warning: {}\n", warning);
  return model;
}

}  // namespace mamba3::cli
