#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "mamba3/tokenizer.h"

namespace mamba3 {

struct LoadOptions {
  // Where the model runs: "cpu", "cuda", or "auto", the GPU if there is one that can be used.
  std::string device = "auto";
  // The type of the matrices and activations on the GPU: "f32", "bf16", or "auto", bf16. On the CPU
  // matrices stay as they are stored and activations are f32.
  std::string dtype = "auto";
  // How the raw decay becomes A: "heavy_tail", "softplus", or "auto", which goes by the layout of
  // the files.
  std::string decay = "auto";
  // A tokenizer.json, or "bytes"; empty: the folder's own.
  std::string tokenizer = {};
};

// What a model is, for people and programs.
struct ModelInfo {
  std::string layout;  // of its files: "official" or "fla"
  int64_t layers = 0;  // attention layers included
  // What each layer mixes tokens with: "mamba3", "mamba2", "gated_deltanet" or "attention".
  std::vector<std::string> layer_kinds;
  std::vector<int64_t> attention_layers;
  int64_t width = 0;       // D
  int64_t mlp_width = 0;   // F of SwiGLU; 0: no MLP
  int64_t heads = 0;       // H
  int64_t head_dim = 0;    // P
  int64_t state_size = 0;  // N
  int64_t groups = 0;      // G, of B and C
  int64_t mimo_rank = 0;   // R; 1 for SISO
  bool mimo = false;
  bool out_norm = false;      // a norm before the gate
  int64_t rotary_angles = 0;  // S
  std::string decay;          // "heavy_tail" or "softplus"; empty without a mamba3 layer
  std::string decay_reason;   // why it was taken
  int64_t vocab = 0;          // token ids are below this
  int64_t vocab_padded = 0;   // rows of the embedding
  bool tied = false;          // the head is the embedding
  int64_t parameters = 0;     // exact count
  std::string device;         // "cpu" or "cuda"
  std::string weight_dtype;   // of the matrices: "f32", "bf16" or "f16"
  int64_t weight_bytes = 0;
  int64_t state_bytes = 0;            // of one sequence, whatever its length
  int64_t state_bytes_per_token = 0;  // on top, for the caches of attention layers
  std::vector<std::string> warnings;  // what loading noticed, such as weights that are not finite
};

// A loaded model: weights (mapped from the file where the format allows) and tokenizer. It is never
// changed, copies share it, and any number of sessions and threads may use it.
class Model {
 public:
  // Loads a checkpoint folder: config.json with model.safetensors, pytorch_model.bin or shards, and
  // tokenizer.json. Without one the tokens are raw bytes if the vocabulary is no larger; else the
  // model has no tokenizer and reads and writes ids only. Throws InputError that says what is wrong
  // with the files.
  static Model load(const std::filesystem::path& folder, const LoadOptions& options = {});

  const ModelInfo& info() const;
  bool has_tokenizer() const;
  const Tokenizer& tokenizer() const;  // throws InputError that says where to get a missing one

  struct Impl;  // of the library's own use
  const Impl& impl() const { return *impl_; }

 private:
  explicit Model(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace mamba3
