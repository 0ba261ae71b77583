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

void add_device_options(CLI::App& command, std::string& device, std::string& dtype, int& threads) {
  command.add_option("--device", device, "cpu, cuda, or auto: the GPU if there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->type_name("NAME")
      ->capture_default_str();
  command
      .add_option("--dtype", dtype,
                  "Of matrices and activations on the GPU: f32, bf16, or auto, bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->type_name("NAME")
      ->capture_default_str();
  command.add_option("--threads", threads, "Threads; 0: as many as there are CPUs")
      ->check(CLI::Range(0, 1024))
      ->type_name("N")
      ->capture_default_str();
}

void add_run_options(CLI::App& command, ModelOptions& options) {
  add_device_options(command, options.device, options.dtype, options.threads);
  command
      .add_option("--state-dtype", options.state_dtype,
                  "Of the recurrent state; bf16 halves it, on the GPU only")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->type_name("NAME")
      ->capture_default_str();
}

Model load_model(const ModelOptions& options) {
  Model model = Model::load(options.folder, {.device = options.device,
                                             .dtype = options.dtype,
                                             .decay = options.decay,
                                             .tokenizer = options.tokenizer});
  for (const std::string& warning : model.info().warnings)
    fmt::print(stderr, "mamba3: warning: {}\n", warning);
  return model;
}

}  // namespace mamba3::cli
