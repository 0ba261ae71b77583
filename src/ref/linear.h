#pragma once

#include <cstdint>

namespace mamba3::ref {

// y (M,N) = x (M,K) weight (N,K)^T + bias (N, or null), or y += ...
template <typename T>
void linear(int64_t M, int64_t N, int64_t K, const T* x, const T* weight, const T* bias, T* y,
            bool accumulate = false) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      T sum = bias ? bias[n] : T(0);
      for (int64_t k = 0; k < K; ++k) sum += x[m * K + k] * weight[n * K + k];
      y[m * N + n] = accumulate ? y[m * N + n] + sum : sum;
    }
  }
}

}  // namespace mamba3::ref
