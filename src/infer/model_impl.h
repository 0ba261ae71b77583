#pragma once

#include <optional>

#include "mamba3/model.h"
#include "model/language_model.h"

namespace mamba3 {

struct Model::Impl {
  LanguageModel language_model;
  std::optional<Tokenizer> tokenizer;
  ModelInfo info;
};

}  // namespace mamba3
