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
  int threads = 0;
};

// -m and --decay, which every such command has.
void add_model_options(CLI::App& command, ModelOptions& options);
void add_tokenizer_option(CLI::App& command, ModelOptions& options);
void add_threads_option(CLI::App& command, ModelOptions& options);

// Loads the model, and shows on stderr what loading warns of.
Model load_model(const ModelOptions& options);

}  // namespace mamba3::cli
