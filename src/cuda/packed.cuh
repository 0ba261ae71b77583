#pragma once

// Where sequences begin and end in a batch, packed or not (ops/packed.h).

#include <cstdint>

#include "cuda/device.cuh"

namespace mamba3::cuda {

// The tokens of a batch row as sequences.
struct Sequences {
  const int32_t* cu_seqlens = nullptr;  // (n+1), or null: each row is one sequence
  int n = 0;
  int T = 0;

  // The packed sequence that holds a token.
  __device__ int index_of(int token) const {
    int low = 0, high = n;  // cu_seqlens[low] <= token < cu_seqlens[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cu_seqlens[middle] <= token ? low : high) = middle;
    }
    return low;
  }

  // The sequence around a token: from x to before y.
  __device__ int2 around(int token) const {
    if (cu_seqlens == nullptr) return {0, T};
    const int i = index_of(token);
    return {cu_seqlens[i], cu_seqlens[i + 1]};
  }
};

inline Sequences sequences_of(const View& cu_seqlens, int64_t T) {
  Sequences sequences{.T = static_cast<int>(T)};
  if (!cu_seqlens.empty()) {
    sequences.cu_seqlens = data<const int32_t>(cu_seqlens);
    sequences.n = static_cast<int>(cu_seqlens.dim(0) - 1);
  }
  return sequences;
}

}  // namespace mamba3::cuda
