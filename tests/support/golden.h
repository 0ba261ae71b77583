#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "formats/safetensors.h"
#include "model/language_model.h"

namespace mamba3::testing {

// Checkpoints with what the reference package makes of them in float64: `expected.safetensors`
// holds input_ids (B, T), logits (B, T, V), residual.I after each block, state.I.{angle,ssm,k,v}
// after the last token and grad.NAME of the mean next-token cross-entropy over all V columns;
// `expected.json` a greedy continuation, the loss and the dialect.

// The folders: those of tests/data/goldens, and of shared/goldens where it is present.
std::vector<std::filesystem::path> golden_folders();
// As a part of the name of a test.
std::string golden_name(const std::filesystem::path& folder);

struct Golden {
  explicit Golden(const std::filesystem::path& folder);

  LanguageModel model;
  TensorFile expected;
  View ids;  // (B, T) i32
  double loss = 0;
  std::vector<int32_t> greedy_prompt, greedy_tokens;
  double greedy_margin = 0;  // the smallest between the two largest logits
  // Ids that the continuation was drawn from: all, but for fla-siso, whose continuation the
  // reference drew from the 253 ids of its sibling folders although the config has 256. (In float64
  // the folder's sixth token is 253 by a margin of 0.05; without it all tokens are as expected.)
  int64_t greedy_vocab = 0;
  std::string dialect;
};

}  // namespace mamba3::testing
