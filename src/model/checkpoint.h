#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/tensors.h"

namespace mamba3 {

struct Checkpoint {
  Config config;
  NamedTensors
      tensors;  // official names whatever the layout; dtypes as stored; file-backed where possible
  std::vector<std::string> warnings;  // non-finite weights, ignored tensors: for the caller to show
};

// Reads a checkpoint folder: config.json with model.safetensors, pytorch_model.bin, or shards and
// their index. Every tensor of parameter_table() is present with its dims; anything else throws
// InputError.
Checkpoint load_checkpoint(const std::filesystem::path& folder,
                           std::string_view decay_act = "auto");

// Writes config.json and model.safetensors in the official layout. Each file is written beside its
// place, flushed and renamed, so that a full disk or a cut leaves the old checkpoint whole.
void save_checkpoint(const std::filesystem::path& folder, const Config& config,
                     const NamedTensors& tensors);

}  // namespace mamba3
