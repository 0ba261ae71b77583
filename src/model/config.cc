#include "model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "core/error.h"

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

// H from d_inner = floor(expand * D).
int64_t parse_heads(const Keys& keys, const MixerNames& names, int64_t D, const MixerShape& m) {
  const double d_inner = std::floor(keys.positive("expand", 2) * static_cast<double>(D));
  if (d_inner < 1 || d_inner > static_cast<double>(kMaxDim)) {
    keys.fail("expand", "* {} must be from 1 to {}, got {}", names.D, kMaxDim, d_inner);
  }
  const int64_t H = static_cast<int64_t>(d_inner) / m.P;
  if (H * m.P != static_cast<int64_t>(d_inner)) {
    keys.fail(names.P, "must divide expand * {} = {}, got {}", names.D, d_inner, m.P);
  }
  if (H % m.G != 0) keys.fail(names.G, "must divide the number of heads {}, got {}", H, m.G);
  return H;
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

// Absent keys have the reference package's defaults.
void parse_mixer(const Keys& keys, const MixerNames& names, Config& c) {
  MixerShape& m = c.mixer;
  m.N = keys.integer(names.N, 128);
  m.P = keys.integer(names.P, 64);
  m.G = keys.integer(names.G, 1);
  m.mimo = keys.flag("is_mimo", false);
  m.R = m.mimo ? keys.integer("mimo_rank", 4) : 1;
  m.rope_pairs = m.mimo ? RopePairs::halves : RopePairs::neighbours;
  m.H = parse_heads(keys, names, c.D, m);
  m.S = parse_angles(keys, names, m);
  if (m.R * m.G * m.N > kMaxDim) {
    keys.fail(names.N, "* {} * mimo_rank must be at most {}, got {}", names.G, kMaxDim,
              m.R * m.G * m.N);
  }
  m.out_norm = keys.flag("is_outproj_norm", false);
  m.A_floor = static_cast<float>(keys.positive("A_floor", 1e-4));
  m.eps = c.eps;
  c.dt_min = keys.positive("dt_min", c.dt_min);
  c.dt_max = keys.positive("dt_max", c.dt_max);
  c.dt_init_floor = keys.positive("dt_init_floor", c.dt_init_floor);
  if (c.dt_max < c.dt_min) {
    keys.fail("dt_max", "must not be below dt_min = {}, got {}", c.dt_min, c.dt_max);
  }
}

void parse_attention_layers(const Keys& keys, Config& c) {
  c.attention_layers = keys.integers("attn_layer_idx");
  std::sort(c.attention_layers.begin(), c.attention_layers.end());
  for (const int64_t layer : c.attention_layers) {
    if (layer < 0 || layer >= c.n_layer) {
      keys.fail("attn_layer_idx", "names layer {}, but the layers are 0 to {}", layer,
                c.n_layer - 1);
    }
  }
  const auto twice = std::adjacent_find(c.attention_layers.begin(), c.attention_layers.end());
  if (twice != c.attention_layers.end()) {
    keys.fail("attn_layer_idx", "names layer {} twice", *twice);
  }
}

// Grouped queries, causal, no positions: what the reference package's attention can do beyond that
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
  for (const std::string_view key : {"rotary_emb_dim", "d_conv", "mlp_dim"}) {
    if (keys.integer(key, 0, 0) != 0) keys.fail(key, "must be 0: no other value is supported");
  }
  if (keys.has("softmax_scale")) keys.fail("softmax_scale", "must be absent: it is not supported");
  return a;
}

// A key of ours within ssm_cfg, where the reference package ignores what it does not know (at the
// top level it would refuse the file). Written for models that it cannot describe otherwise.
constexpr std::string_view kDecayKey = "decay_act";
constexpr std::string_view kEpsKey = "norm_eps";

std::string_view name_of(DecayAct act) {
  return act == DecayAct::softplus ? "softplus" : "heavy_tail";
}

std::optional<DecayAct> decay_act_named(std::string_view name) {
  for (const DecayAct act : {DecayAct::heavy_tail, DecayAct::softplus}) {
    if (name == name_of(act)) return act;
  }
  return std::nullopt;
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
  const std::string layer = ssm.text("layer", "Mamba1");
  if (layer != "Mamba3") {
    ssm.fail("layer", "is {:?}{}: only \"Mamba3\" is supported", layer,
             ssm.has("layer") ? "" : " when absent");
  }
  c.eps = static_cast<float>(ssm.positive(kEpsKey, kOfficialEps));
  parse_mixer(ssm, kOfficialNames, c);
  c.decay_reason = "the default of the official layout";
  if (const std::string act = ssm.text(kDecayKey, ""); !act.empty()) {
    if (!decay_act_named(act)) {
      ssm.fail(kDecayKey, "must be \"heavy_tail\" or \"softplus\", got {:?}", act);
    }
    c.mixer.decay_act = *decay_act_named(act);
    c.decay_reason = "ssm_cfg.decay_act in config.json";
  }

  parse_attention_layers(keys, c);
  if (!c.attention_layers.empty()) c.attention = parse_attention(keys.object("attn_cfg"), c.D);
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
  const std::optional<DecayAct> act = decay_act_named(name);
  if (!act) input_error("unknown decay_act {:?}: use auto, heavy_tail or softplus", name);
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

nlohmann::ordered_json ssm_json(const Config& c) {
  const MixerShape& m = c.mixer;
  nlohmann::ordered_json json = {
      {"layer", "Mamba3"},
      {"d_state", m.N},
      {"expand", expand_of(m.d_inner(), c.D)},
      {"headdim", m.P},
      {"ngroups", m.G},
      {"rope_fraction", m.S == m.N / 2 ? 1.0 : 0.5},
      {"chunk_size", chunk_size(m)},
      {"is_mimo", m.mimo},
      {"mimo_rank", m.mimo ? m.R : 4},
      {"A_floor", shortest(m.A_floor)},
      {"dt_min", c.dt_min},
      {"dt_max", c.dt_max},
      {"dt_init_floor", c.dt_init_floor},
      {"is_outproj_norm", m.out_norm},
  };
  if (m.decay_act != DecayAct::heavy_tail) json[kDecayKey] = name_of(m.decay_act);
  if (c.eps != kOfficialEps) json[kEpsKey] = shortest(c.eps);
  return json;
}

nlohmann::ordered_json attention_json(const Config& c) {
  if (c.attention_layers.empty()) return nlohmann::ordered_json::object();
  return {
      {"causal", true},
      {"num_heads", c.attention.Hq},
      {"num_heads_kv", c.attention.Hkv},
      {"head_dim", c.attention.d},
      {"qkv_proj_bias", c.attention.qkv_bias},
      {"out_proj_bias", c.attention.out_bias},
      {"rotary_emb_dim", 0},
      {"d_conv", 0},
      {"mlp_dim", 0},
  };
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

bool Config::is_attention(int64_t layer) const {
  return std::binary_search(attention_layers.begin(), attention_layers.end(), layer);
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
      {"attn_layer_idx", c.attention_layers},
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
