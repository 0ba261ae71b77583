// What the kernels of src/cpu share on top of Highway. A kernel file is compiled once for every
// instruction set and the best is chosen at run time:
//
//   #undef HWY_TARGET_INCLUDE
//   #define HWY_TARGET_INCLUDE "cpu/NAME.cc"
//   #include "hwy/foreach_target.h"
//   #include "cpu/simd-inl.h"
//
//   HWY_BEFORE_NAMESPACE();
//   namespace mamba3::cpu::HWY_NAMESPACE {
//   namespace { ... kernels; lambdas need HWY_ATTR ... }
//   }
//   HWY_AFTER_NAMESPACE();
//   #if HWY_ONCE
//   namespace mamba3::cpu { HWY_EXPORT(kernel); ... HWY_DYNAMIC_DISPATCH(kernel)(...); }
//   #endif

// The guard lets the header in again for every target.
#if defined(MAMBA3_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_SIMD_INL_H_
#undef MAMBA3_CPU_SIMD_INL_H_
#else
#define MAMBA3_CPU_SIMD_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "core/dtype.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using Lanes = hn::ScalableTag<float>;
using Vector = hn::Vec<Lanes>;

inline constexpr Lanes kLanes;

// A vector's worth of floats in memory, for the rest of a row that does not fill a vector.
struct alignas(64) LaneBuffer {
  float values[hn::MaxLanes(Lanes{})] = {};
};

HWY_INLINE int64_t lane_count() {
  return static_cast<int64_t>(hn::Lanes(kLanes));
}

// Loads of any weight dtype as f32. Nothing needs to be aligned.
HWY_INLINE Vector load(const float* source) {
  return hn::LoadU(kLanes, source);
}

HWY_INLINE Vector load(const bf16* source) {
  const hn::RebindToUnsigned<Lanes> du32;
  const hn::Rebind<uint16_t, Lanes> du16;
  const auto bits = hn::LoadU(du16, reinterpret_cast<const uint16_t*>(source));
  return hn::BitCast(kLanes, hn::ShiftLeft<16>(hn::PromoteTo(du32, bits)));
}

HWY_INLINE Vector load(const f16* source) {
  const hn::Rebind<hwy::float16_t, Lanes> df16;
  return hn::PromoteTo(kLanes, hn::LoadU(df16, reinterpret_cast<const hwy::float16_t*>(source)));
}

HWY_INLINE void store(Vector value, float* target) {
  hn::StoreU(value, kLanes, target);
}

// The first n < lane_count() elements; the other lanes are 0. Touches no memory behind them.
template <typename T>
HWY_INLINE Vector load_part(const T* source, int64_t n) {
  LaneBuffer buffer;
  for (int64_t i = 0; i < n; ++i) buffer.values[i] = static_cast<float>(source[i]);
  return hn::Load(kLanes, buffer.values);
}

HWY_INLINE void store_part(Vector value, float* target, int64_t n) {
  LaneBuffer buffer;
  hn::Store(value, kLanes, buffer.values);
  std::copy_n(buffer.values, n, target);
}

// How a loop body touches memory: whole vectors, or the part that is left at the end of a row.
struct Whole {
  template <typename T>
  HWY_INLINE Vector load(const T* source) const {
    return HWY_NAMESPACE::load(source);
  }
  HWY_INLINE void store(Vector value, float* target) const { HWY_NAMESPACE::store(value, target); }
  // The lanes that stand for elements, and `other` in the rest.
  HWY_INLINE Vector keep(Vector value, Vector /*other*/) const { return value; }
};

struct Part {
  int64_t n;
  template <typename T>
  HWY_INLINE Vector load(const T* source) const {
    return load_part(source, n);
  }
  HWY_INLINE void store(Vector value, float* target) const { store_part(value, target, n); }
  HWY_INLINE Vector keep(Vector value, Vector other) const {
    return hn::IfThenElse(hn::FirstN(kLanes, static_cast<size_t>(n)), value, other);
  }
};

// Calls body(access, i) for i = 0, L, 2L, ... below n, L the number of lanes: `access` is Whole,
// and Part for the last call if n is no multiple of L. The body is written once:
//   for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR { access.store(..., out + i); });
template <typename Body>
HWY_INLINE void for_each_vector(int64_t n, const Body& body) {
  const int64_t lanes = lane_count();
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(Whole{}, i);
  if (i < n) body(Part{n - i}, i);
}

HWY_INLINE float sum_of(Vector value) {
  return hn::GetLane(hn::SumOfLanes(kLanes, value));
}

HWY_INLINE float max_of(Vector value) {
  return hn::GetLane(hn::MaxOfLanes(kLanes, value));
}

// sum_i a_i b_i, for a and b of any weight dtype. Four sums hide the latency of the addition.
template <typename A, typename B>
HWY_INLINE float dot(const A* a, const B* b, int64_t n) {
  const int64_t lanes = lane_count();
  Vector sum0 = hn::Zero(kLanes), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    sum0 = hn::MulAdd(load(a + i), load(b + i), sum0);
    sum1 = hn::MulAdd(load(a + i + lanes), load(b + i + lanes), sum1);
    sum2 = hn::MulAdd(load(a + i + 2 * lanes), load(b + i + 2 * lanes), sum2);
    sum3 = hn::MulAdd(load(a + i + 3 * lanes), load(b + i + 3 * lanes), sum3);
  }
  for_each_vector(n - i, [&](auto access, int64_t j) HWY_ATTR {
    sum0 = hn::MulAdd(access.load(a + i + j), access.load(b + i + j), sum0);
  });
  return sum_of(hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3)));
}

// out = x as f32, for x of any weight dtype.
template <typename T>
HWY_INLINE void convert(const T* x, float* out, int64_t n) {
  for_each_vector(
      n, [&](auto access, int64_t i) HWY_ATTR { access.store(access.load(x + i), out + i); });
}

// Elementary functions with a relative error of a few 1e-7, for every x: overflow gives infinity,
// underflow 0, NaN stays NaN.
HWY_INLINE Vector exp(Vector x) {
  // Highway's is defined up to 104 and turns NaN into 0.
  const Vector y = hn::Exp(kLanes, hn::Min(x, hn::Set(kLanes, 104.0f)));
  return hn::IfThenElse(hn::IsNaN(x), x, y);
}

HWY_INLINE Vector sigmoid(Vector x) {
  const Vector one = hn::Set(kLanes, 1.0f);
  return hn::Div(one, hn::Add(one, exp(hn::Neg(x))));
}

HWY_INLINE Vector silu(Vector x) {
  return hn::Div(x, hn::Add(hn::Set(kLanes, 1.0f), exp(hn::Neg(x))));
}

// log(1 + exp(x)), in the form that neither overflows nor cancels.
HWY_INLINE Vector softplus(Vector x) {
  const Vector tail = hn::Log1p(kLanes, exp(hn::Neg(hn::Abs(x))));
  return hn::Add(hn::IfThenElse(hn::IsNaN(x), x, hn::Max(x, hn::Zero(kLanes))), tail);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_SIMD_INL_H_
