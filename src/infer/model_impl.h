#pragma once

#include <optional>

#include "mamba3/model.h"
#include "model/language_model.h"

namespace mamba3 {

struct Model::Impl {
  LanguageModel language_model;  // where it runs
  std::string fingerprint;       // of the files' weights, wherever the model runs
  std::optional<Tokenizer> tokenizer;
  ModelInfo info;
};

}  // namespace mamba3
