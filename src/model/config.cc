#include "model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "core/error.h"
#include "ops/short_conv.h"

namespace mamba3 {

namespace {

using Json = nlohmann::json;

// No dimension of a model is larger: keeps every product of dimensions, and the sum over all
// layers, far from the end of 64-bit integers.
constexpr int64_t kMaxDim = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxLayers = 1 << 14;
constexpr int64_t kMaxPadding = 1 << 16;

// The hidden width of the reference package's MLP is a multiple of this.
constexpr int64_t kMlpMultiple = 128;

// The reference package has no key for eps, so the official layout means this one.
constexpr float kOfficialEps = 1e-5f;

int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A JSON object whose values are read with their type and range checked. A value of null counts as
// absent, as None does in the reference package.
class Keys {
 public:
  Keys(const Json& object, std::string path, std::string_view source)
      : object_(object), path_(std::move(path)), source_(source) {}

  bool has(std::string_view key) const { return find(key) != nullptr; }

  // In [low, high]; without a fallback the key must be there.
  int64_t integer(std::string_view key, std::optional<int64_t> fallback = std::nullopt,
                  int64_t low = 1, int64_t high = kMaxDim) const {
    const Json* value = find(key);
    if (value == nullptr && fallback) return *fallback;
    if (value == nullptr) fail(key, "is missing");
    const bool fits =
        value->is_number_integer() &&
        (!value->is_number_unsigned() || value->get<uint64_t>() <= static_cast<uint64_t>(high)) &&
        value->get<int64_t>() >= low && value->get<int64_t>() <= high;
    if (!fits) {
      fail(key, "must be an integer from {} to {}, got {}", low, high, excerpt(*value));
    }
    return value->get<int64_t>();
  }

  // Within what a float holds.
  double positive(std::string_view key, double fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_number() || !(value->get<double>() >= 1e-30) ||
        !(value->get<double>() <= 1e30)) {
      fail(key, "must be a number from 1e-30 to 1e30, got {}", excerpt(*value));
    }
    return value->get<double>();
  }

  bool flag(std::string_view key, bool fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return fallback;
    if (!value->is_boolean()) fail(key, "must be true or false, got {}", excerpt(*value));
    return value->get<bool>();
  }

  std::string text(std::string_view key, std::string_view fallback) const {
    const Json* value = find(key);
    if (value == nullptr) return std::string(fallback);
    if (!value->is_string()) fail(key, "must be a string, got {}", excerpt(*value));
    return value->get<std::string>();
  }

  // An absent object is an empty one.
  Keys object(std::string_view key) const {
    static const Json empty = Json::object();
    const Json* value = find(key);
    if (value == nullptr) value = &empty;
    if (!value->is_object()) fail(key, "must be an object, got {}", excerpt(*value));
    return Keys(*value, path_ + std::string(key) + ".", source_);
  }

  std::vector<std::string> texts(std::string_view key) const {
    const Json* value = find(key);
    if (value == nullptr) return {};
    const bool fits = value->is_array() && std::all_of(value->begin(), value->end(),
                                                       [](auto& v) { return v.is_string(); });
    if (!fits) fail(key, "must be an array of strings, got {}", excerpt(*value));
    return value->get<std::vector<std::string>>();
  }

  std::vector<int64_t> integers(std::string_view key) const {
    const Json* value = find(key);
    if (value == nullptr) return {};
    const bool fits = value->is_array() && std::all_of(value->begin(), value->end(), [](auto& v) {
                        return v.is_number_integer();
                      });
    if (!fits) fail(key, "must be an array of integers, got {}", excerpt(*value));
    return value->get<std::vector<int64_t>>();
  }

  // "config.json: ssm_cfg.d_state must be ..."
  template <typename... Args>
  [[noreturn]] void fail(std::string_view key, fmt::format_string<Args...> format,
                         Args&&... args) const {
    input_error("{}: {}{} {}", source_, path_, key,
                fmt::format(format, std::forward<Args>(args)...));
  }

 private:
  const Json* find(std::string_view key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  static std::string excerpt(const Json& value) {
    constexpr size_t kLength = 40;
    std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (text.size() > kLength) text = text.substr(0, kLength) + "...";
    return text;
  }

  const Json& object_;
  std::string path_;
  std::string_view source_;
};

Json parse_json(std::string_view json, std::string_view source) {
  Json root;
  try {
    root = Json::parse(json);
  } catch (const Json::exception& exception) {
    const std::string_view what = exception.what();  // "[json.exception...] parse error at line"
    input_error("{}: not valid JSON: {}", source, what.substr(what.find(']') + 2));
  }
  if (!root.is_object()) input_error("{}: must be a JSON object", source);
  return root;
}

// The mixer's keys have other names in each layout.
struct MixerNames {
  std::string_view D, N, P, G;
};
constexpr MixerNames kOfficialNames{"d_model", "d_state", "headdim", "ngroups"};
constexpr MixerNames kFlaNames{"hidden_size", "state_size", "head_dim", "n_groups"};

// H from d_inner = floor(expand * D), P and G.
int64_t parse_heads(const Keys& keys, const MixerNames& names, int64_t D, int64_t P, int64_t G) {
  const double d_inner = std::floor(keys.positive("expand", 2) * static_cast<double>(D));
  if (d_inner < 1 || d_inner > static_cast<double>(kMaxDim)) {
    keys.fail("expand", "* {} must be from 1 to {}, got {}", names.D, kMaxDim, d_inner);
  }
  const int64_t H = static_cast<int64_t>(d_inner) / P;
  if (H * P != static_cast<int64_t>(d_inner)) {
    keys.fail(names.P, "must divide expand * {} = {}, got {}", names.D, d_inner, P);
  }
  if (H % G != 0) keys.fail(names.G, "must divide the number of heads {}, got {}", H, G);
  return H;
}

// Keys of ours within ssm_cfg, where the reference package ignores what it does not know (at the
// top level it would refuse the file). Written for models that it cannot describe otherwise.
constexpr std::string_view kDecayKey = "decay_act";
constexpr std::string_view kEpsKey = "norm_eps";
constexpr std::string_view kLayersKey = "layers";
constexpr std::string_view kConvKey = "external_conv";  // width; Mamba-3 has none

// A value that is written as one of a list of names.
template <typename Value>
struct Named {
  std::string_view name;
  Value value;
};
constexpr Named<DecayAct> kDecayActs[] = {{"heavy_tail", DecayAct::heavy_tail},
                                          {"softplus", DecayAct::softplus}};
constexpr Named<Discretisation> kDiscretisations[] = {{"trapezoidal", Discretisation::trapezoidal},
                                                      {"half", Discretisation::half},
                                                      {"euler", Discretisation::euler}};
// The first is our name, the second that of ssm_cfg.layer in config.json.
constexpr Named<LayerKind> kLayerKinds[] = {{"mamba3", LayerKind::mamba3},
                                            {"mamba2", LayerKind::mamba2},
                                            {"gated_deltanet", LayerKind::gated_deltanet},
                                            {"attention", LayerKind::attention}};
constexpr Named<LayerKind> kOfficialKinds[] = {{"Mamba3", LayerKind::mamba3},
                                               {"Mamba2", LayerKind::mamba2},
                                               {"GatedDeltaNet", LayerKind::gated_deltanet}};

template <typename Value, size_t n>
std::optional<Value> value_named(const Named<Value> (&list)[n], std::string_view name) {
  for (const Named<Value>& row : list) {
    if (row.name == name) return row.value;
  }
  return std::nullopt;
}
template <typename Value, size_t n>
std::string_view name_in(const Named<Value> (&list)[n], Value value) {
  for (const Named<Value>& row : list) {
    if (row.value == value) return row.name;
  }
  return {};
}
// "a, b or c"
template <typename Value, size_t n>
std::string names_of(const Named<Value> (&list)[n]) {
  std::string names;
  for (size_t i = 0; i < n; ++i) {
    names += i == 0 ? "" : i + 1 == n ? " or " : ", ";
    names += list[i].name;
  }
  return names;
}
template <typename Value, size_t n>
Value choice(const Keys& keys, std::string_view key, const Named<Value> (&list)[n],
             Value fallback) {
  const std::string name = keys.text(key, name_in(list, fallback));
  const std::optional<Value> value = value_named(list, name);
  if (!value) keys.fail(key, "must be {}, got {:?}", names_of(list), name);
  return *value;
}

// S = floor(N * rope_fraction) / 2.
int64_t parse_angles(const Keys& keys, const MixerNames& names, const MixerShape& m) {
  const double fraction = keys.positive("rope_fraction", 0.5);
  if (fraction != 0.5 && fraction != 1) {
    keys.fail("rope_fraction", "must be 0.5 or 1, got {}", fraction);
  }
  const int64_t S = (fraction == 1 ? m.N : m.N / 2) / 2;
  if (S == 0) keys.fail(names.N, "is {}, too small for rope_fraction {}", m.N, fraction);
  if (m.rope_pairs == RopePairs::halves && m.N % 2 != 0) {
    keys.fail(names.N, "must be even when is_mimo is true, got {}", m.N);
  }
  return S;
}

void parse_dt(const Keys& keys, Config& c) {
  c.dt_min = keys.positive("dt_min", c.dt_min);
  c.dt_max = keys.positive("dt_max", c.dt_max);
  c.dt_init_floor = keys.positive("dt_init_floor", c.dt_init_floor);
  if (c.dt_max < c.dt_min) {
    keys.fail("dt_max", "must not be below dt_min = {}, got {}", c.dt_min, c.dt_max);
  }
}

// The dimensions that all kinds of recurrent layers share. Absent keys have the reference package's
// defaults.
void parse_dims(const Keys& keys, const MixerNames& names, int64_t D, MixerShape& m) {
  m.N = keys.integer(names.N, 128);
  m.P = keys.integer(names.P, 64);
  m.G = keys.integer(names.G, 1);
  m.H = parse_heads(keys, names, D, m.P, m.G);
}

int64_t parse_conv_width(const Keys& keys) {
  return keys.integer("d_conv", 4, kNarrowestConv, kWidestConv);
}

void parse_mixer(const Keys& keys, const MixerNames& names, Config& c) {
  MixerShape& m = c.mixer;
  parse_dims(keys, names, c.D, m);
  m.mimo = keys.flag("is_mimo", false);
  m.R = m.mimo ? keys.integer("mimo_rank", 4) : 1;
  m.rope_pairs = m.mimo ? RopePairs::halves : RopePairs::neighbours;
  m.S = parse_angles(keys, names, m);
  if (m.R * m.G * m.N > kMaxDim) {
    keys.fail(names.N, "* {} * mimo_rank must be at most {}, got {}", names.G, kMaxDim,
              m.R * m.G * m.N);
  }
  m.out_norm = keys.flag("is_outproj_norm", false);
  m.A_floor = static_cast<float>(keys.positive("A_floor", 1e-4));
  m.eps = c.eps;
  parse_dt(keys, c);
}

// What is not Mamba-3 as published.
void parse_ablations(const Keys& ssm, Config& c) {
  MixerShape& m = c.mixer;
  const std::string rope = ssm.text("rope", "data");
  if (rope == "none") {
    m.S = 0;
  } else if (rope == "standard") {
    m.rope = Rope::standard;
  } else if (rope != "data") {
    ssm.fail("rope", "must be data, standard or none, got {:?}", rope);
  }
  m.discretisation = choice(ssm, "discretisation", kDiscretisations, Discretisation::trapezoidal);
  m.bc_bias = ssm.flag("bc_bias", true);
  if (const int64_t width = ssm.integer(kConvKey, 0, 0, kWidestConv); width > 0) {
    if (width < kNarrowestConv) {
      ssm.fail(kConvKey, "must be 0 or from {} to {}, got {}", kNarrowestConv, kWidestConv, width);
    }
    c.mixer_conv = {.width = width, .bias = true};
  }
}

// Mamba-2 as in the reference package: the scan of Mamba-3 with lam = 1, a constant A, no rotation,
// and neither norm nor bias of B and C.
void parse_mamba2(const Keys& ssm, Config& c) {
  MixerShape& m = c.mamba2;
  parse_dims(ssm, kOfficialNames, c.D, m);
  m.discretisation = Discretisation::euler;
  m.decay_act = DecayAct::constant;
  m.bc_norm = m.bc_bias = false;
  m.eps = c.eps;
  c.mamba2_conv = {.width = parse_conv_width(ssm), .bias = ssm.flag("conv_bias", true)};
  for (const auto& [key, only] : {std::pair{"rmsnorm", true},
                                  {"norm_before_gate", false},
                                  {"bias", false},
                                  {"D_has_hdim", false}}) {
    if (ssm.flag(key, only) != only) ssm.fail(key, "must be {}: no other value is supported", only);
  }
  for (const char* key : {"d_ssm", "dt_limit"}) {
    if (ssm.has(key)) ssm.fail(key, "must be absent: it is not supported");
  }
  parse_dt(ssm, c);
}

// Gated DeltaNet with as many heads and as large a state as a Mamba layer of the same keys.
void parse_delta(const Keys& ssm, Config& c) {
  MixerShape m;
  parse_dims(ssm, kOfficialNames, c.D, m);
  if (m.G != 1) ssm.fail("ngroups", "must be 1 in a Gated DeltaNet layer, got {}", m.G);
  for (const auto& [name, dim] : {std::pair{kOfficialNames.N, m.N}, {kOfficialNames.P, m.P}}) {
    if (dim > kWidestDeltaHead) {
      ssm.fail(name, "must be at most {} in a Gated DeltaNet layer, got {}", kWidestDeltaHead, dim);
    }
  }
  c.delta = {
      .H = m.H, .K = m.N, .V = m.P, .negative = ssm.flag("allow_neg_eigval", false), .eps = c.eps};
  // conv_bias is of Mamba-2 layers, which may stand beside.
  c.delta_conv.width = parse_conv_width(ssm);
  parse_dt(ssm, c);
}

std::vector<int64_t> parse_attention_layers(const Keys& keys, int64_t n_layer) {
  std::vector<int64_t> layers = keys.integers("attn_layer_idx");
  std::sort(layers.begin(), layers.end());
  for (const int64_t layer : layers) {
    if (layer < 0 || layer >= n_layer) {
      keys.fail("attn_layer_idx", "names layer {}, but the layers are 0 to {}", layer, n_layer - 1);
    }
  }
  const auto twice = std::adjacent_find(layers.begin(), layers.end());
  if (twice != layers.end()) keys.fail("attn_layer_idx", "names layer {} twice", *twice);
  return layers;
}

LayerKind recurrent_kind(const Keys& ssm, std::string_view key, const std::string& name) {
  const std::optional<LayerKind> kind = value_named(kOfficialKinds, name);
  if (kind) return *kind;
  ssm.fail(key, "is {:?}{}: only {} are supported", name, ssm.has(key) ? "" : " when absent",
           names_of(kOfficialKinds));
}

// The kind of each layer.
std::vector<LayerKind> parse_layers(const Keys& keys, const Keys& ssm, int64_t n_layer) {
  std::vector<LayerKind> layers;
  if (const std::vector<std::string> names = ssm.texts(kLayersKey); !names.empty()) {
    if (std::ssize(names) != n_layer) {
      ssm.fail(kLayersKey, "must name {} layers, got {}", n_layer, names.size());
    }
    for (const std::string& name : names) layers.push_back(recurrent_kind(ssm, kLayersKey, name));
  } else {
    layers.assign(static_cast<size_t>(n_layer),
                  recurrent_kind(ssm, "layer", ssm.text("layer", "Mamba1")));
  }
  for (const int64_t layer : parse_attention_layers(keys, n_layer)) {
    layers[static_cast<size_t>(layer)] = LayerKind::attention;
  }
  return layers;
}

// Grouped queries, causal: what the reference package's attention can do beyond that
// is refused. Absent keys have its defaults, which for `causal` is false.
AttentionConfig parse_attention(const Keys& keys, int64_t D) {
  AttentionConfig a;
  a.Hq = keys.integer("num_heads");
  a.Hkv = keys.integer("num_heads_kv", a.Hq);
  if (a.Hq % a.Hkv != 0) {
    keys.fail("num_heads_kv", "must divide num_heads = {}, got {}", a.Hq, a.Hkv);
  }
  if (!keys.has("head_dim") && D % a.Hq != 0) {
    keys.fail("num_heads", "must divide d_model = {} unless head_dim is given, got {}", D, a.Hq);
  }
  a.d = keys.integer("head_dim", D / a.Hq);
  if (a.Hq * a.d > kMaxDim) {
    keys.fail("num_heads", "* head_dim must be at most {}, got {}", kMaxDim, a.Hq * a.d);
  }
  a.qkv_bias = keys.flag("qkv_proj_bias", true);
  a.out_bias = keys.flag("out_proj_bias", true);
  if (!keys.flag("causal", false)) {
    keys.fail("causal", "must be true: only causal attention is supported");
  }
  for (const std::string_view key : {"d_conv", "mlp_dim"}) {
    if (keys.integer(key, 0, 0) != 0) keys.fail(key, "must be 0: no other value is supported");
  }
  if (keys.has("softmax_scale")) keys.fail("softmax_scale", "must be absent: it is not supported");
  a.rotary_dims = keys.integer("rotary_emb_dim", 0, 0, a.d);
  if (a.rotary_dims % 2 != 0) {
    keys.fail("rotary_emb_dim", "must be even, got {}", a.rotary_dims);
  }
  a.rotary_base = keys.positive("rotary_emb_base", a.rotary_base);
  if (keys.flag("rotary_emb_interleaved", false)) {
    keys.fail("rotary_emb_interleaved", "must be false: no other value is supported");
  }
  return a;
}

Config parse_official(const Keys& keys) {
  Config c;
  c.D = keys.integer("d_model");
  c.n_layer = keys.integer("n_layer", std::nullopt, 1, kMaxLayers);
  c.d_mlp = round_up(keys.integer("d_intermediate", 0, 0), kMlpMultiple);
  c.vocab = keys.integer("vocab_size", std::nullopt, 1, kMaxVocab);
  c.vocab_padded = round_up(c.vocab, keys.integer("pad_vocab_size_multiple", 8, 1, kMaxPadding));
  c.tied = keys.flag("tie_embeddings", true);
  if (!keys.flag("rms_norm", true)) keys.fail("rms_norm", "must be true: LayerNorm is unsupported");

  const Keys ssm = keys.object("ssm_cfg");
  c.eps = static_cast<float>(ssm.positive(kEpsKey, kOfficialEps));
  c.layers = parse_layers(keys, ssm, c.n_layer);
  if (c.has(LayerKind::mamba3)) {
    parse_mixer(ssm, kOfficialNames, c);
    parse_ablations(ssm, c);
    c.mixer.decay_act = choice(ssm, kDecayKey, kDecayActs, DecayAct::heavy_tail);
    c.decay_reason = ssm.has(kDecayKey) ? "ssm_cfg.decay_act in config.json"
                                        : "the default of the official layout";
  }
  if (c.has(LayerKind::mamba2)) parse_mamba2(ssm, c);
  if (c.has(LayerKind::gated_deltanet)) parse_delta(ssm, c);
  if (c.has(LayerKind::attention)) c.attention = parse_attention(keys.object("attn_cfg"), c.D);
  return c;
}

Config parse_fla(const Keys& keys) {
  Config c;
  c.layout = Layout::fla;
  if (const std::string type = keys.text("model_type", "mamba3"); type != "mamba3") {
    keys.fail("model_type", "is {:?}: only \"mamba3\" is supported", type);
  }
  c.D = keys.integer("hidden_size");
  c.n_layer = keys.integer("num_hidden_layers", std::nullopt, 1, kMaxLayers);
  c.vocab = keys.integer("vocab_size", std::nullopt, 1, kMaxVocab);
  c.vocab_padded = c.vocab;
  c.tied = keys.flag("tie_word_embeddings", false);
  c.eps = static_cast<float>(keys.positive("norm_eps", kOfficialEps));
  if (keys.flag("use_bias", false)) keys.fail("use_bias", "must be false: biases are unsupported");
  parse_mixer(keys, kFlaNames, c);
  if (keys.integer("num_heads", c.mixer.H) != c.mixer.H) {
    keys.fail("num_heads", "must be expand * hidden_size / head_dim = {}, got {}", c.mixer.H,
              keys.integer("num_heads"));
  }
  c.mixer.decay_act = DecayAct::softplus;
  c.decay_reason = "the default of the flash-linear-attention layout";
  return c;
}

void override_decay_act(std::string_view name, Config& c) {
  if (name == "auto") return;
  const std::optional<DecayAct> act = value_named(kDecayActs, name);
  if (!act) input_error("unknown decay_act {:?}: use auto, heavy_tail or softplus", name);
  if (!c.has(LayerKind::mamba3)) return;
  c.mixer.decay_act = *act;
  c.decay_reason = "asked for";
}

// The double whose shortest decimal form is the float's: 1e-5 and not 9.99999974737875e-06.
double shortest(float value) {
  return std::stod(fmt::format("{}", value));
}

// expand, such that floor(expand * D) is d_inner in double arithmetic too.
nlohmann::ordered_json expand_of(int64_t d_inner, int64_t D) {
  if (d_inner % D == 0) return d_inner / D;
  const double expand = static_cast<double>(d_inner) / static_cast<double>(D);
  const bool short_of = expand * static_cast<double>(D) < static_cast<double>(d_inner);
  return short_of ? std::nextafter(expand, std::numeric_limits<double>::infinity()) : expand;
}

int64_t pad_multiple(const Config& c) {
  int64_t multiple = 1;
  while (round_up(c.vocab, multiple) < c.vocab_padded) multiple *= 2;
  return round_up(c.vocab, multiple) == c.vocab_padded ? multiple : c.vocab_padded;
}

// Kernels of the reference package take chunks of 64 / R tokens, a power of two.
int64_t chunk_size(const MixerShape& m) {
  int64_t size = 64;
  while (size > 1 && size * m.R > 64) size /= 2;
  return size;
}

// The keys of Mamba-3 alone.
void add_mamba3(const Config& c, nlohmann::ordered_json& json) {
  const MixerShape& m = c.mixer;
  json["rope_fraction"] = m.S == m.N / 2 ? 1.0 : 0.5;
  json["chunk_size"] = chunk_size(m);
  json["is_mimo"] = m.mimo;
  json["mimo_rank"] = m.mimo ? m.R : 4;
  json["A_floor"] = shortest(m.A_floor);
  json["is_outproj_norm"] = m.out_norm;
  if (m.decay_act != DecayAct::heavy_tail) json[kDecayKey] = name_in(kDecayActs, m.decay_act);
  if (m.S == 0) json["rope"] = "none";
  if (m.S > 0 && m.rope == Rope::standard) json["rope"] = "standard";
  if (m.discretisation != Discretisation::trapezoidal) {
    json["discretisation"] = name_in(kDiscretisations, m.discretisation);
  }
  if (!m.bc_bias) json["bc_bias"] = false;
  if (c.mixer_conv.width > 0) json[kConvKey] = c.mixer_conv.width;
}

// The kinds of the recurrent layers, in the order of the first of each.
std::vector<LayerKind> recurrent_kinds(const Config& c) {
  std::vector<LayerKind> kinds;
  for (int64_t layer = 0; layer < c.n_layer; ++layer) {
    const LayerKind kind = c.kind(layer);
    const bool seen = std::find(kinds.begin(), kinds.end(), kind) != kinds.end();
    if (kind != LayerKind::attention && !seen) kinds.push_back(kind);
  }
  return kinds;
}

nlohmann::ordered_json ssm_json(const Config& c) {
  const std::vector<LayerKind> kinds = recurrent_kinds(c);
  if (kinds.empty()) return {{"layer", official_name_of(LayerKind::attention)}};
  const Config::Heads heads = c.heads();
  nlohmann::ordered_json json = {
      {"layer", official_name_of(kinds.front())},
      {"d_state", heads.N},
      {"expand", expand_of(heads.H * heads.P, c.D)},
      {"headdim", heads.P},
      {"ngroups", c.has(LayerKind::mamba2) ? c.mamba2.G : c.mixer.G},
      {"dt_min", c.dt_min},
      {"dt_max", c.dt_max},
      {"dt_init_floor", c.dt_init_floor},
  };
  if (kinds.size() > 1) {
    for (int64_t layer = 0; layer < c.n_layer; ++layer) {
      json[kLayersKey].push_back(official_name_of(c.kind(layer)));
    }
  }
  if (c.has(LayerKind::mamba3)) add_mamba3(c, json);
  if (c.has(LayerKind::mamba2)) {
    json["d_conv"] = c.mamba2_conv.width;
    json["conv_bias"] = c.mamba2_conv.bias;
  }
  if (c.has(LayerKind::gated_deltanet)) {
    json["allow_neg_eigval"] = c.delta.negative;
    json["d_conv"] = c.delta_conv.width;
  }
  if (c.eps != kOfficialEps) json[kEpsKey] = shortest(c.eps);
  return json;
}

nlohmann::ordered_json attention_json(const Config& c) {
  if (!c.has(LayerKind::attention)) return nlohmann::ordered_json::object();
  nlohmann::ordered_json json = {
      {"causal", true},
      {"num_heads", c.attention.Hq},
      {"num_heads_kv", c.attention.Hkv},
      {"head_dim", c.attention.d},
      {"qkv_proj_bias", c.attention.qkv_bias},
      {"out_proj_bias", c.attention.out_bias},
      {"rotary_emb_dim", c.attention.rotary_dims},
      {"d_conv", 0},
      {"mlp_dim", 0},
  };
  if (c.attention.rotary_dims > 0) json["rotary_emb_base"] = c.attention.rotary_base;
  return json;
}

// Table of the paper's appendix C, with the sizes' published names.
struct PublishedSize {
  std::array<std::string_view, 3> names;  // the first is ours, the others are in use too
  int64_t D, n_layer, siso_mlp, mimo_mlp;
};
constexpr std::array<PublishedSize, 4> kPublishedSizes{{
    {{"187m", "180m", "187m"}, 768, 12, 1500, 1264},
    {{"443m", "440m", "444m"}, 1024, 24, 2048, 1792},
    {{"893m", "880m", "894m"}, 1536, 24, 3072, 2800},
    {{"1.5b", "1.5b", "1.5b"}, 2048, 24, 4096, 3824},
}};
constexpr int64_t kPublishedVocab = 128256;  // Llama-3.1's

}  // namespace

std::string_view name_of(LayerKind kind) {
  return name_in(kLayerKinds, kind);
}

std::string_view official_name_of(LayerKind kind) {
  return name_in(kOfficialKinds, kind == LayerKind::attention ? LayerKind::mamba3 : kind);
}

LayerKind parse_layer_kind(std::string_view name) {
  const std::optional<LayerKind> kind = value_named(kLayerKinds, name);
  if (!kind) input_error("unknown kind of layer '{}': use {}", name, names_of(kLayerKinds));
  return *kind;
}

std::vector<int64_t> Config::layers_of(LayerKind wanted) const {
  std::vector<int64_t> found;
  for (int64_t layer = 0; layer < n_layer; ++layer) {
    if (kind(layer) == wanted) found.push_back(layer);
  }
  return found;
}

bool Config::has(LayerKind wanted) const {
  if (layers.empty()) return n_layer > 0 && wanted == LayerKind::mamba3;
  return std::find(layers.begin(), layers.end(), wanted) != layers.end();
}

Config::Heads Config::heads() const {
  if (has(LayerKind::mamba3)) return {mixer.H, mixer.P, mixer.N};
  if (has(LayerKind::mamba2)) return {mamba2.H, mamba2.P, mamba2.N};
  return {delta.H, delta.V, delta.K};
}

LayerWidths widths_of(const Config& c, int64_t layer) {
  switch (c.kind(layer)) {
    case LayerKind::mamba3:
      return {c.mixer.d_proj(), c.mixer.d_inner()};
    case LayerKind::mamba2:
      return {c.mamba2.d_proj(), c.mamba2.d_inner()};
    case LayerKind::gated_deltanet:
      return {c.delta.d_proj(), c.delta.d_inner()};
    case LayerKind::attention:
      return {(c.attention.Hq + 2 * c.attention.Hkv) * c.attention.d,
              c.attention.Hq * c.attention.d};
  }
  return {};
}

ConvLayer conv_of(const Config& c, int64_t layer) {
  const auto over = [](const ConvConfig& conv, int64_t first, int64_t channels) {
    return ConvLayer{first, channels, conv.width, conv.bias};
  };
  switch (c.kind(layer)) {
    case LayerKind::mamba3:
      return over(c.mixer_conv, c.mixer.x(), c.mixer.conv_channels());
    case LayerKind::mamba2:
      return over(c.mamba2_conv, c.mamba2.x(), c.mamba2.conv_channels());
    case LayerKind::gated_deltanet:
      return over(c.delta_conv, c.delta.q(), c.delta.conv_channels());
    case LayerKind::attention:
      return {};
  }
  return {};
}

Config parse_config(std::string_view json, std::string_view source, std::string_view decay_act) {
  const Json root = parse_json(json, source);
  const Keys keys(root, "", source);
  if (!keys.has("d_model") && !keys.has("hidden_size")) {
    keys.fail("d_model",
              "is missing (and so is hidden_size, its name in the "
              "flash-linear-attention layout)");
  }
  Config config = keys.has("d_model") ? parse_official(keys) : parse_fla(keys);
  override_decay_act(decay_act, config);
  return config;
}

std::string to_json(const Config& c) {
  const nlohmann::ordered_json json = {
      {"d_model", c.D},
      {"d_intermediate", c.d_mlp},
      {"n_layer", c.n_layer},
      {"vocab_size", c.vocab},
      {"ssm_cfg", ssm_json(c)},
      {"attn_layer_idx", c.layers_of(LayerKind::attention)},
      {"attn_cfg", attention_json(c)},
      {"rms_norm", true},
      {"residual_in_fp32", true},
      {"fused_add_norm", true},
      {"pad_vocab_size_multiple", pad_multiple(c)},
      {"tie_embeddings", c.tied},
  };
  return json.dump(2) + "\n";
}

Config published_config(std::string_view size) {
  const std::string_view name = size.substr(0, size.find('-'));
  const std::string_view kind = size.substr(std::min(size.size(), name.size() + 1));
  for (const PublishedSize& row : kPublishedSizes) {
    const bool named = std::find(row.names.begin(), row.names.end(), name) != row.names.end();
    if (!named || (kind != "siso" && kind != "mimo")) continue;
    const bool mimo = kind == "mimo";
    Config c;
    c.D = row.D;
    c.n_layer = row.n_layer;
    c.d_mlp = round_up(mimo ? row.mimo_mlp : row.siso_mlp, kMlpMultiple);
    c.vocab = c.vocab_padded = kPublishedVocab;
    c.mixer = {.H = 2 * row.D / 64,
               .P = 64,
               .N = 128,
               .R = mimo ? 4 : 1,
               .S = 32,
               .mimo = mimo,
               .rope_pairs = mimo ? RopePairs::halves : RopePairs::neighbours};
    c.decay_reason = "what the published checkpoints use";
    return c;
  }
  input_error("unknown model size {:?}: use 187m, 443m, 893m or 1.5b, followed by -siso or -mimo",
              size);
}

}  // namespace mamba3
