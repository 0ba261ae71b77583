#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/tensors.h"

namespace mamba3 {

struct Checkpoint {
  Config config;
  NamedTensors tensors;  // by official names whatever the layout; dtypes as stored, f32, bf16 or
                         // f16; parts of the mapped files where possible: not to be written to
  std::vector<std::string> warnings;  // non-finite weights, ignored tensors: for the caller to show
};

// Reads a checkpoint folder: config.json with model.safetensors, pytorch_model.bin, or shards and
// their index, the first of these that is there. Every tensor of parameter_table() is present with
// its dims; rows that vocabulary padding lacks are added. Anything else throws InputError.
Checkpoint load_checkpoint(const std::filesystem::path& folder,
                           std::string_view decay_act = "auto");

// Writes config.json and model.safetensors in the official layout, dtypes as given. Each file is
// written beside its place and flushed before the first is renamed, so that a full disk or a cut
// leaves the old checkpoint whole. The folder is created if need be. Throws Error.
void save_checkpoint(const std::filesystem::path& folder, const Config& config,
                     const NamedTensors& tensors);

}  // namespace mamba3
