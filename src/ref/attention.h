#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ref/number.h"

namespace mamba3::ref {

// One sequence of T tokens: qkv (T, (Hq + 2 Hkv) d) -> y (T, Hq d) and lse (Hq, T).
//   s_ij = q_i . k_j / sqrt(d) for j <= i,  lse_i = log(sum_j e^s_ij),  y_i = sum_j e^(s_ij -
//   lse_i) v_j
template <typename T>
void attention(int64_t Hq, int64_t Hkv, int64_t d, int64_t tokens, const T* qkv, T* y, T* lse) {
  using std::exp, std::log;
  if (tokens == 0) return;  // there need not be any memory
  const int64_t columns = (Hq + 2 * Hkv) * d;
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  std::vector<T> scores(static_cast<size_t>(tokens));
  for (int64_t h = 0; h < Hq; ++h) {
    const T* q = qkv + h * d;
    const T* k = qkv + (Hq + h / (Hq / Hkv)) * d;
    const T* v = k + Hkv * d;
    for (int64_t i = 0; i < tokens; ++i) {
      double largest = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j <= i; ++j) {
        T sum(0);
        for (int64_t c = 0; c < d; ++c) sum += q[i * columns + c] * k[j * columns + c];
        scores[static_cast<size_t>(j)] = sum * scale;
        largest = std::max(largest, real_part(sum) * scale);
      }
      T sum(0);
      for (int64_t j = 0; j <= i; ++j) sum += exp(scores[static_cast<size_t>(j)] - largest);
      lse[h * tokens + i] = log(sum) + largest;
      T* out = y + (i * Hq + h) * d;
      for (int64_t c = 0; c < d; ++c) out[c] = T(0);
      for (int64_t j = 0; j <= i; ++j) {
        const T p = exp(scores[static_cast<size_t>(j)] - lse[h * tokens + i]);
        for (int64_t c = 0; c < d; ++c) out[c] += p * v[j * columns + c];
      }
    }
  }
}

}  // namespace mamba3::ref
