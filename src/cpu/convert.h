#pragma once

#include <algorithm>
#include <cstdint>

#include "core/context.h"

namespace mamba3::cpu {

// core's to_float with the widest vectors of this machine, for f32, bf16 and f16 (aligned to their
// size).
void to_float_fast(const void* source, DType dtype, float* out, int64_t n);

// Calls use(rows of the weight as f32, first, last) for tiles of rows that cover it: all at once
// if it is f32 already, else widened into scratch that stays in a shared cache.
template <typename Use>
void for_f32_tiles(Context& ctx, const View& weight, Use&& use) {
  constexpr int64_t kElements = 1 << 20, kFewest = 64;
  const int64_t N = weight.dim(0), K = weight.dim(1);
  if (weight.dtype == DType::f32) return use(weight.as<float>(), 0, N);
  const int64_t rows = std::min(N, std::max(kFewest, kElements / std::max<int64_t>(K, 1)));
  ScratchScope scope(ctx.scratch);
  float* const tile = scope.take<float>(rows * K).data();
  const char* const stored = static_cast<const char*>(weight.data);
  for (int64_t first = 0; first < N; first += rows) {
    const int64_t last = std::min(N, first + rows);
    ctx.threads.parallel_for((last - first) * K, 1 << 15, [&](int64_t begin, int64_t end, int) {
      to_float_fast(stored + (first * K + begin) * size_of(weight.dtype), weight.dtype,
                    tile + begin, end - begin);
    });
    use(tile, first, last);
  }
}

}  // namespace mamba3::cpu
