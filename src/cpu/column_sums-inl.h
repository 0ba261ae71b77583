// Sums over the rows of a matrix in a fixed order, for gradients of weights: threads sum blocks of
// rows, then the blocks are added. Included once per instruction set (Highway's foreach_target).

#include "cpu/simd-inl.h"

#if defined(MAMBA3_CPU_COLUMN_SUMS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_COLUMN_SUMS_INL_H_
#undef MAMBA3_CPU_COLUMN_SUMS_INL_H_
#else
#define MAMBA3_CPU_COLUMN_SUMS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

// total (n) += row 0 + row 1 + ... of partial, in this order.
inline void add_partials(const float* partial, int64_t rows, int64_t stride, float* total,
                         int64_t n) {
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    Vector sum = hn::Zero(kLanes);
    for (int64_t row = 0; row < rows; ++row)
      sum = hn::Add(sum, access.load(partial + row * stride + i));
    access.store(hn::Add(access.load(total + i), sum), total + i);
  });
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_COLUMN_SUMS_INL_H_
