#include "infer/perplexity.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "core/error.h"

namespace mamba3 {

double Perplexity::nats_per_token() const {
  return nats / static_cast<double>(tokens);
}

double Perplexity::perplexity() const {
  return std::exp(nats_per_token());
}

double Perplexity::bits_per_byte(int64_t bytes) const {
  return nats / std::numbers::ln2 / static_cast<double>(bytes);
}

Perplexity perplexity(Engine& engine, std::span<const int32_t> tokens,
                      const PerplexityOptions& options,
                      const std::function<void(int64_t)>& progress) {
  if (options.context < 1) input_error("the context must be positive, got {}", options.context);
  const auto targets = static_cast<int64_t>(tokens.size()) - 1;
  if (targets < 1) {
    input_error("perplexity needs at least two tokens, and the text has {}", tokens.size());
  }
  std::vector<float> nll(static_cast<size_t>(std::min(options.context, targets)));
  Perplexity sum;
  engine.reset();
  for (int64_t begin = 0; begin < targets; begin += options.context) {
    const int64_t T = std::min(options.context, targets - begin);
    if (!options.carry_state) engine.reset();
    engine.score(view_of(tokens.data() + begin, {1, T}), view_of(tokens.data() + begin + 1, {1, T}),
                 view_of(nll.data(), {1, T}));
    for (int64_t t = 0; t < T; ++t) sum.nats += static_cast<double>(nll[static_cast<size_t>(t)]);
    sum.tokens += T;
    if (progress) progress(sum.tokens);
  }
  return sum;
}

}  // namespace mamba3
