#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace mamba3::cpu {

// core's to_float with the widest vectors of this machine, for f32, bf16 and f16 (aligned to their
// size).
void to_float_fast(const void* source, DType dtype, float* out, int64_t n);

}  // namespace mamba3::cpu
