#pragma once

#include <span>
#include <vector>

#include "infer/engine.h"
#include "infer/model_impl.h"
#include "mamba3/session.h"

namespace mamba3 {

struct Session::Impl {
  Impl(const Model& session_model, const SessionOptions& options)
      : model(session_model),
        engine(model.impl().language_model, 1, options.threads,
               state_types(model.impl().language_model, options.state_dtype)) {}

  Model model;  // keeps what the engine refers to
  Engine engine;
  std::vector<int32_t> recent;  // the last tokens, at most kRecentTokens: for the repeat penalty
  std::vector<float> logits;    // (V), of the last token
  bool logits_current = false;  // else they belong to an earlier token

  // For every token that the engine reads.
  void note(std::span<const int32_t> tokens);
};

// Repeat windows are at most this long, which bounds what a session remembers of its text.
inline constexpr int64_t kRecentTokens = 4096;

}  // namespace mamba3
