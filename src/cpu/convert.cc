#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/convert.cc"
#include "cpu/convert.h"

#include <hwy/foreach_target.h>

#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void convert_bf16(const void* source, float* out, int64_t n) {
  convert(static_cast<const bf16*>(source), out, n);
}

void convert_f16(const void* source, float* out, int64_t n) {
  convert(static_cast<const f16*>(source), out, n);
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace mamba3::cpu {

HWY_EXPORT(convert_bf16);
HWY_EXPORT(convert_f16);

void to_float_fast(const void* source, DType dtype, float* out, int64_t n) {
  switch (dtype) {
    case DType::bf16:
      return HWY_DYNAMIC_DISPATCH(convert_bf16)(source, out, n);
    case DType::f16:
      return HWY_DYNAMIC_DISPATCH(convert_f16)(source, out, n);
    default:
      return to_float(source, dtype, out, n);
  }
}

}  // namespace mamba3::cpu

#endif
