#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/convert.cc"
#include "cpu/convert.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Widens whole vectors and returns the number of elements done.
template <typename Stored>
int64_t widen(const Stored* source, float* out, int64_t n) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<Stored, decltype(d)> d_stored;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d)), whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes) {
    hn::StoreU(hn::PromoteTo(d, hn::LoadU(d_stored, source + i)), d, out + i);
  }
  return whole;
}

int64_t widen_bf16(const void* source, float* out, int64_t n) {
  return widen(static_cast<const hwy::bfloat16_t*>(source), out, n);
}

int64_t widen_f16(const void* source, float* out, int64_t n) {
  return widen(static_cast<const hwy::float16_t*>(source), out, n);
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace mamba3::cpu {

HWY_EXPORT(widen_bf16);
HWY_EXPORT(widen_f16);

void to_float_fast(const void* source, DType dtype, float* out, int64_t n) {
  int64_t done = 0;
  if (dtype == DType::bf16) done = HWY_DYNAMIC_DISPATCH(widen_bf16)(source, out, n);
  if (dtype == DType::f16) done = HWY_DYNAMIC_DISPATCH(widen_f16)(source, out, n);
  to_float(static_cast<const char*>(source) + done * size_of(dtype), dtype, out + done, n - done);
}

}  // namespace mamba3::cpu

#endif
