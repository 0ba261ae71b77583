#pragma once

#include <string>

#include "mamba3/model.h"

namespace CLI {
class App;
}

namespace mamba3::cli {

// The flags of every command that runs a model.
struct ModelOptions {
  std::string folder;
  std::string decay = "auto";
  std::string tokenizer;
  std::string device = "auto";
  std::string dtype = "auto";
  std::string state_dtype = "f32";
  int threads = 0;
};

// -m and --decay, which every such command has.
void add_model_options(CLI::App& command, ModelOptions& options);
void add_tokenizer_option(CLI::App& command, ModelOptions& options);
// --device, --dtype and --threads.
void add_device_options(CLI::App& command, std::string& device, std::string& dtype, int& threads);
// The same and --state-dtype.
void add_run_options(CLI::App& command, ModelOptions& options);

// Loads the model, and shows on stderr what loading warns of.
Model load_model(const ModelOptions& options);

}  // namespace mamba3::cli
