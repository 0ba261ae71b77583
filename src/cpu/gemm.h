#pragma once

#include <algorithm>

#include "core/context.h"

namespace mamba3::cpu {

// Row-major f32 product on the calling thread: C (M,N) = op(A) op(B) + beta C, where op transposes
// if asked; A is (M,K) or, transposed, (K,M) in memory, likewise B. Leading dims in elements.
struct Gemm {
  bool transpose_a = false, transpose_b = false;
  int64_t M = 0, N = 0, K = 0;
  const float* a = nullptr;
  int64_t lda = 0;
  const float* b = nullptr;
  int64_t ldb = 0;
  float beta = 0;
  float* c = nullptr;
  int64_t ldc = 0;
};

void gemm_serial(const Gemm& gemm);
// The same, shared among the context's threads. Not from inside a parallel_for.
void gemm(Context& ctx, const Gemm& gemm);

// The leading dim of a view of rows: its stride, which a single row need not have.
inline int64_t row_stride(const View& rows) {
  return rows.dim(0) > 1 ? rows.stride(0) : std::max<int64_t>(rows.dim(1), 1);
}

}  // namespace mamba3::cpu
