#pragma once

#include "core/dtype.h"
#include "cuda_runtime.h"

struct __half {
  mamba3::f16 value;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  return static_cast<float>(h.value);
}
inline __half __float2half_rn(float f) {
  return {mamba3::f16(f)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 h) {
  return {__half2float(h.x), __half2float(h.y)};
}
inline __half2 __low2half2(__half2 h) {
  return {h.x, h.x};
}
inline __half2 __high2half2(__half2 h) {
  return {h.y, h.y};
}
inline __half2 __lowhigh2highlow(__half2 h) {
  return {h.y, h.x};
}
// Rounded once, as from a float of the exact sum or product.
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x),
                           __half2float(a.y) + __half2float(b.y));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x),
                           __half2float(a.y) * __half2float(b.y));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __floats2half2_rn(fmaf(__half2float(a.x), __half2float(b.x), __half2float(c.x)),
                           fmaf(__half2float(a.y), __half2float(b.y), __half2float(c.y)));
}
