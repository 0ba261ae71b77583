#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "infer/engine.h"

namespace mamba3 {

struct PerplexityOptions {
  int64_t context = 2048;  // tokens of a window
  // Whether a window continues the state of the one before. By default windows are independent, as
  // is usual, and each starts from zero.
  bool carry_state = false;
};

struct Perplexity {
  int64_t tokens = 0;  // scored
  double nats = 0;     // their sum of -log p

  double nats_per_token() const;
  double perplexity() const;                  // e^(nats per token)
  double bits_per_byte(int64_t bytes) const;  // `bytes`: of the text that the scored tokens cover
};

// Scores every token but the first exactly once. A window reads up to `context` tokens and predicts
// the one after each of them, so the first token of a window is the last that the window before
// predicts. Padding ids take no part. `progress` hears the number of tokens scored so far. Throws
// InputError for fewer than two tokens.
Perplexity perplexity(Engine& engine, std::span<const int32_t> tokens,
                      const PerplexityOptions& options,
                      const std::function<void(int64_t)>& progress = {});

}  // namespace mamba3
