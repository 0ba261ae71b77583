#include "cpu/packed.h"

namespace mamba3::cpu {

TokenPlaces token_places(const View& batch, const View& cu_seqlens, ScratchScope& scratch) {
  const int64_t B = batch.dim(0), T = batch.dim(1);
  const TokenPlaces places{scratch.take<int32_t>(B * T), scratch.take<int32_t>(B * T)};
  size_t token = 0;
  const auto add = [&](int64_t sequence, int64_t length) {
    for (int64_t t = 0; t < length; ++t, ++token) {
      places.sequence[token] = static_cast<int32_t>(sequence);
      places.position[token] = static_cast<int32_t>(t);
    }
  };
  if (cu_seqlens.empty()) {
    for (int64_t b = 0; b < B; ++b) add(b, T);
  } else {
    const int32_t* cu = cu_seqlens.as<int32_t>();
    for (int64_t i = 0; i + 1 < cu_seqlens.dim(0); ++i) add(i, cu[i + 1] - cu[i]);
  }
  return places;
}

}  // namespace mamba3::cpu
