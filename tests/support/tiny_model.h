#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "model/config.h"
#include "model/language_model.h"
#include "support/random.h"
#include "support/tensor.h"

namespace mamba3::testing {

// Configs of models small enough for tests, by name: a base row, and rows that vary one thing.
struct TinyConfig {
  std::string name;  // "siso", "mimo", "hybrid", ...
  Config config;
};
void PrintTo(const TinyConfig& tiny, std::ostream* out);
// For INSTANTIATE_TEST_SUITE_P.
std::string tiny_test_name(const ::testing::TestParamInfo<TinyConfig>& tiny);

std::vector<TinyConfig> tiny_configs();
Config tiny_config(std::string_view name);

// Parameters in which nothing is at its neutral value (norm weights around 1, biases around their
// initial values), so that a term left out shows.
NamedTensors tiny_parameters(const Config& config, uint64_t seed);

LanguageModel tiny_model(const Config& config, uint64_t seed);

// Parameters and gradients together, as training holds them.
struct TinyGradients {
  NamedTensors tensors;  // zeroed
  ModelWeights views;
};
TinyGradients tiny_gradients(const Config& config);

// Writes a checkpoint of a tiny model and returns its folder inside `parent`.
std::filesystem::path save_tiny_checkpoint(const std::filesystem::path& parent,
                                           std::string_view config_name, uint64_t seed = 1);

}  // namespace mamba3::testing
