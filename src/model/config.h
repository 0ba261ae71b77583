#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ops/delta.h"
#include "ops/mixer.h"

namespace mamba3 {

// What a layer mixes its tokens with.
enum class LayerKind : uint8_t { mamba3, mamba2, gated_deltanet, attention };
std::string_view name_of(LayerKind kind);  // "mamba3", ...
// As ssm_cfg.layer in config.json has it: "Mamba3", ... An attention layer, which is named
// elsewhere, has the name of Mamba-3 there.
std::string_view official_name_of(LayerKind kind);
// Throws InputError that lists the names.
LayerKind parse_layer_kind(std::string_view name);

// Grouped-query causal attention, without positions unless rotary_dims > 0.
struct AttentionConfig {
  int64_t Hq = 0, Hkv = 0, d = 0;
  bool qkv_bias = false, out_bias = false;
  int64_t rotary_dims = 0;  // channels of a head that rotate with the position
  double rotary_base = 10000;
};

// The short convolution over what enters the recurrence; width 0: none.
struct ConvConfig {
  int64_t width = 0;
  bool bias = false;
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
  std::vector<LayerKind> layers;  // the kind of each layer; empty: all are mamba3
  MixerShape mixer;               // of the mamba3 layers
  ConvConfig mixer_conv;
  MixerShape mamba2;  // of the mamba2 layers; a norm follows their gate
  ConvConfig mamba2_conv;
  DeltaShape delta;  // of the gated_deltanet layers
  ConvConfig delta_conv;
  AttentionConfig attention;  // of the attention layers
  double dt_min = 1e-3, dt_max = 0.1, dt_init_floor = 1e-4;
  Layout layout = Layout::official;
  std::string decay_reason;  // why mixer.decay_act is what it is, for people

  LayerKind kind(int64_t layer) const {
    return layers.empty() ? LayerKind::mamba3 : layers.at(static_cast<size_t>(layer));
  }
  std::vector<int64_t> layers_of(LayerKind kind) const;
  bool has(LayerKind kind) const;
  // Of the recurrent layers, whatever their kind: H heads with a state of (P, N).
  struct Heads {
    int64_t H = 0, P = 0, N = 0;
  };
  Heads heads() const;
};

// What a layer makes of the stream, in columns.
struct LayerWidths {
  int64_t proj = 0;  // of in_proj's output
  int64_t y = 0;     // of out_proj's input
};
LayerWidths widths_of(const Config& config, int64_t layer);

// The short convolution of a layer: over `channels` columns of its projection from `first` on.
struct ConvLayer {
  int64_t first = 0, channels = 0;
  int64_t width = 0;  // 0: there is none
  bool bias = false;
};
ConvLayer conv_of(const Config& config, int64_t layer);

// Reads config.json of either layout. `source` names the file in messages. Unless `decay_act` is
// "auto" it overrides the dialect ("heavy_tail" or "softplus"). Throws InputError for a missing,
// absurd or unsupported key, naming it.
Config parse_config(std::string_view json, std::string_view source,
                    std::string_view decay_act = "auto");

// config.json in the official layout, as the reference package reads it. What that has no key for
// goes into ssm_cfg, where the reference package ignores what it does not know and parse_config
// honours it: the softplus dialect (decay_act), an eps other than 1e-5 (norm_eps), ablations (rope,
// discretisation, bc_bias, external_conv), and layers of several kinds (layers).
std::string to_json(const Config& config);

// The published sizes: "187m-siso", "187m-mimo", "443m-siso", ..., "1.5b-mimo". Throws InputError
// that lists the names.
Config published_config(std::string_view size);

}  // namespace mamba3
