#pragma once

#include <vector>

#include "ref/number.h"

namespace mamba3::ref {

// One sequence, in (T,X) -> out (T,X): columns [first, first + C) are convolved with weight (C,W),
// the others copied. bias is (C) or empty; state (W-1,C) holds the inputs before, and is updated.
template <typename T>
std::vector<T> short_conv(const std::vector<T>& in, size_t X, size_t first,
                          const std::vector<T>& weight, const std::vector<T>& bias,
                          std::vector<T>& state, size_t C) {
  const size_t W = weight.size() / C, tokens = in.size() / X;
  std::vector<T> out = in;
  for (size_t c = 0; c < C; ++c) {
    std::vector<T> inputs;
    for (size_t k = 0; k + 1 < W; ++k) inputs.push_back(state[k * C + c]);
    for (size_t t = 0; t < tokens; ++t) inputs.push_back(in[t * X + first + c]);
    for (size_t t = 0; t < tokens; ++t) {
      T sum = bias.empty() ? T(0) : bias[c];
      for (size_t j = 0; j < W; ++j) sum += weight[c * W + j] * inputs[t + j];
      out[t * X + first + c] = silu(sum);
    }
    for (size_t k = 0; k + 1 < W; ++k) state[k * C + c] = inputs[tokens + k];
  }
  return out;
}

}  // namespace mamba3::ref
