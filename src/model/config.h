#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ops/mixer.h"

namespace mamba3 {

// Grouped-query causal attention without positions, in the layers of a hybrid that name it.
struct AttentionConfig {
  int64_t Hq = 0, Hkv = 0, d = 0;
  bool qkv_bias = false, out_bias = false;
};

enum class Layout : uint8_t { official, fla };  // of the files it was read from

struct Config {
  int64_t D = 0;  // model width
  int64_t n_layer = 0;
  int64_t d_mlp = 0;         // F of SwiGLU, already rounded up to a multiple of 128; 0: no MLP
  int64_t vocab = 0;         // ids below this exist
  int64_t vocab_padded = 0;  // V: rows of the embedding
  bool tied = true;          // lm_head is the embedding
  float eps = 1e-5f;
  MixerShape mixer;
  std::vector<int64_t> attention_layers;  // sorted; the other layers are Mamba-3 mixers
  AttentionConfig attention;
  double dt_min = 1e-3, dt_max = 0.1, dt_init_floor = 1e-4;
  Layout layout = Layout::official;
  std::string decay_reason;  // why mixer.decay_act is what it is, for people

  bool is_attention(int64_t layer) const;
};

// Reads config.json of either layout. `source` names the file in messages. Unless `decay_act` is
// "auto" it overrides the dialect ("heavy_tail" or "softplus"). Throws InputError for a missing,
// absurd or unsupported key, naming it.
Config parse_config(std::string_view json, std::string_view source,
                    std::string_view decay_act = "auto");

// config.json in the official layout, as the reference package reads it. What that has no key for,
// the softplus dialect and an eps other than 1e-5, goes into ssm_cfg as decay_act and norm_eps,
// which the reference package ignores and parse_config honours.
std::string to_json(const Config& config);

// The published sizes: "187m-siso", "187m-mimo", "443m-siso", ..., "1.5b-mimo". Throws InputError
// that lists the names.
Config published_config(std::string_view size);

}  // namespace mamba3
