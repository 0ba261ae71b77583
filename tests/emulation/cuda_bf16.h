#pragma once

#include "core/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  mamba3::bf16 value;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return static_cast<float>(value.value);
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {mamba3::bf16(value)};
}
