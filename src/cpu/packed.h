#pragma once

#include <cstdint>
#include <span>

#include "core/scratch.h"
#include "core/view.h"

namespace mamba3::cpu {

// Of every token b T + t of a batch, packed or not (ops/packed.h): its sequence, and its position
// there.
struct TokenPlaces {
  std::span<int32_t> sequence, position;  // (B T)
};

TokenPlaces token_places(const View& batch, const View& cu_seqlens, ScratchScope& scratch);

// The f32 row of token b T + t of a view (B, T, columns).
inline float* row_of_token(const View& view, int64_t token) {
  const int64_t T = view.dim(1);
  return view.as<float>() + token / T * view.stride(0) + token % T * view.stride(1);
}

}  // namespace mamba3::cpu
