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

void make_hybrid(Config& config) {
  config.n_layer = 3;
  config.attention_layers = {1};
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
