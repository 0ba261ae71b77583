#include "support/tiny_model.h"

#include <algorithm>
#include <ostream>

#include "core/error.h"
#include "model/checkpoint.h"
#include "model/init.h"

namespace mamba3::testing {

namespace {

Config base_config() {
  Config config;
  config.D = 32;
  config.n_layer = 2;
  config.d_mlp = 128;
  config.vocab = 61;
  config.vocab_padded = 64;
  config.mixer.H = 4;
  config.mixer.P = 16;
  config.mixer.N = 16;
  config.mixer.S = 4;
  return config;
}

template <typename Change>
TinyConfig varied(std::string name, Change&& change) {
  TinyConfig tiny{std::move(name), base_config()};
  change(tiny.config);
  return tiny;
}

void make_mimo(Config& config, int64_t R) {
  config.mixer.mimo = true;
  config.mixer.R = R;
  config.mixer.rope_pairs = RopePairs::halves;
}

void make_mamba2(Config& config, int64_t G) {
  config.layers.assign(static_cast<size_t>(config.n_layer), LayerKind::mamba2);
  config.mamba2 = {.H = 4,
                   .P = 16,
                   .N = 16,
                   .G = G,
                   .bc_norm = false,
                   .bc_bias = false,
                   .discretisation = Discretisation::euler,
                   .decay_act = DecayAct::constant};
  config.mamba2_conv = {.width = 4, .bias = true};
}

void make_delta(Config& config) {
  config.layers.assign(static_cast<size_t>(config.n_layer), LayerKind::gated_deltanet);
  config.delta = {.H = 4, .K = 16, .V = 16, .negative = true};
  config.delta_conv = {.width = 4, .bias = false};
}

void make_hybrid(Config& config) {
  config.n_layer = 3;
  config.layers = {LayerKind::mamba3, LayerKind::attention, LayerKind::mamba3};
  config.attention = {.Hq = 4, .Hkv = 2, .d = 8, .qkv_bias = true, .out_bias = true};
}

}  // namespace

void PrintTo(const TinyConfig& tiny, std::ostream* out) {
  *out << tiny.name;
}

std::string tiny_test_name(const ::testing::TestParamInfo<TinyConfig>& tiny) {
  std::string name = tiny.param.name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

std::vector<TinyConfig> tiny_configs() {
  return {
      varied("siso", [](Config&) {}),
      varied("mimo", [](Config& c) { make_mimo(c, 4); }),
      varied("mimo-odd",
             [](Config& c) {
               make_mimo(c, 3);
               c.D = 24;
               c.mixer.H = 2;
               c.mixer.P = 24;
               c.mixer.N = 48;
               c.mixer.S = 24;
               c.mixer.out_norm = true;
             }),
      varied("groups",
             [](Config& c) {
               c.mixer.G = 2;
               c.mixer.S = 8;
               c.mixer.out_norm = true;
               c.tied = false;
             }),
      varied("no-mlp",
             [](Config& c) {
               c.d_mlp = 0;
               c.mixer.decay_act = DecayAct::softplus;
             }),
      varied("hybrid", make_hybrid),
      varied("hybrid-rope",
             [](Config& c) {
               make_hybrid(c);
               c.attention.rotary_dims = 6;
             }),
      varied("ablations",
             [](Config& c) {
               c.mixer.rope = Rope::standard;
               c.mixer.discretisation = Discretisation::half;
               c.mixer.bc_bias = false;
               c.mixer_conv = {.width = 3, .bias = true};
             }),
      varied("real-euler",
             [](Config& c) {
               c.mixer.S = 0;
               c.mixer.discretisation = Discretisation::euler;
             }),
      varied("mamba2", [](Config& c) { make_mamba2(c, 1); }),
      varied("mamba2-groups", [](Config& c) { make_mamba2(c, 2); }),
      varied("gated-deltanet", [](Config& c) { make_delta(c); }),
      varied("all-kinds",
             [](Config& c) {
               make_mamba2(c, 1);
               make_delta(c);
               make_hybrid(c);
               c.n_layer = 4;
               c.layers = {LayerKind::mamba3, LayerKind::mamba2, LayerKind::attention,
                           LayerKind::gated_deltanet};
             }),
  };
}

Config tiny_config(std::string_view name) {
  for (const TinyConfig& tiny : tiny_configs()) {
    if (tiny.name == name) return tiny.config;
  }
  error("no tiny config is called {}", name);
}

NamedTensors tiny_parameters(const Config& config, uint64_t seed) {
  Context ctx(1);
  NamedTensors tensors = init_parameters(ctx, config, seed);
  Random random(seed);
  for (const TensorSpec& spec : parameter_table(config)) {
    const View& view = tensors.at(spec.name);
    const bool matrix = view.rank == 2 && spec.decay;
    for (int64_t i = 0; i < view.size(); ++i) {
      float& value = view.as<float>()[i];
      if (matrix) value *= 4;  // strong enough to make the layers matter
      value += static_cast<float>((matrix ? 0.02 : 0.2) * random.normal());
    }
  }
  return tensors;
}

LanguageModel tiny_model(const Config& config, uint64_t seed) {
  return make_language_model(config, tiny_parameters(config, seed));
}

TinyGradients tiny_gradients(const Config& config) {
  TinyGradients gradients{allocate(parameter_table(config)), {}};
  gradients.views = resolve_weights(config, gradients.tensors);
  return gradients;
}

std::filesystem::path save_tiny_checkpoint(const std::filesystem::path& parent,
                                           std::string_view config_name, uint64_t seed) {
  const Config config = tiny_config(config_name);
  const std::filesystem::path folder = parent / config_name;
  std::filesystem::create_directories(folder);
  save_checkpoint(folder, config, tiny_parameters(config, seed));
  return folder;
}

}  // namespace mamba3::testing
