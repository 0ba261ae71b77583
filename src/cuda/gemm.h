#pragma once

#include <cstdint>

#include "core/context.h"
#include "core/dtype.h"

namespace mamba3::cuda {

// Row-major product with f32 accumulation: C (M,N) = op(A) op(B) + beta C, where op transposes if
// asked; A is (M,K) or, transposed, (K,M) in memory, likewise B. Leading dims in elements. A and B
// are of one dtype; it and that of C are f32 or bf16. The product of f32 is that of f32, not TF32.
struct Gemm {
  bool transpose_a = false, transpose_b = false;
  int64_t M = 0, N = 0, K = 0;
  DType dtype = DType::f32;  // of A and B
  const void* a = nullptr;
  int64_t lda = 0;
  const void* b = nullptr;
  int64_t ldb = 0;
  float beta = 0;
  DType dtype_c = DType::f32;
  void* c = nullptr;
  int64_t ldc = 0;
};

// By cuBLASLt, or by a kernel of our own where it has none. Sums are taken in an order that does
// not vary from run to run.
void gemm(Context& ctx, const char* op, const Gemm& gemm);

}  // namespace mamba3::cuda
