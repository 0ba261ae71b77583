// Products of matrices that fit in the L1 and L2 caches, for the chunks of mixer_scan. Included
// once per instruction set (Highway's foreach_target).

#include "cpu/small_matrix.h"
#include "hwy/highway.h"

#if defined(MAMBA3_CPU_SMALL_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_SMALL_GEMM_INL_H_
#undef MAMBA3_CPU_SMALL_GEMM_INL_H_
#else
#define MAMBA3_CPU_SMALL_GEMM_INL_H_
#endif

#ifndef MAMBA3_UNROLL
#ifdef __clang__
#define MAMBA3_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MAMBA3_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rows of a register tile; its columns are two vectors. 16 of 32 registers accumulate with AVX-512,
// 8 of 16 with the others.
inline constexpr int kTileRows = HWY_TARGET <= HWY_AVX3 ? 8 : 4;

template <int kRows, int kVectors, bool kTransposeA>
HWY_INLINE void multiply_tile(int64_t K, const float* HWY_RESTRICT a, int64_t lda,
                              const float* HWY_RESTRICT b, int64_t ldb, float* HWY_RESTRICT c,
                              int64_t ldc, bool accumulate) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  hn::Vec<decltype(d)> sum[kRows][kVectors];
  MAMBA3_UNROLL
  for (int i = 0; i < kRows; ++i) {
    MAMBA3_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = accumulate ? hn::Load(d, c + i * ldc + j * lanes) : hn::Zero(d);
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    hn::Vec<decltype(d)> b_k[kVectors];
    MAMBA3_UNROLL
    for (int j = 0; j < kVectors; ++j) b_k[j] = hn::Load(d, b + k * ldb + j * lanes);
    MAMBA3_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const auto a_ik = hn::Set(d, kTransposeA ? a[k * lda + i] : a[i * lda + k]);
      MAMBA3_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(a_ik, b_k[j], sum[i][j]);
    }
  }
  MAMBA3_UNROLL
  for (int i = 0; i < kRows; ++i) {
    MAMBA3_UNROLL
    for (int j = 0; j < kVectors; ++j) hn::Store(sum[i][j], d, c + i * ldc + j * lanes);
  }
}

// kRows rows of C: C[i, 0..columns) (+)= sum_{k in [k_begin, k_end)} op(A)[i, k] B[k, :].
template <int kRows, bool kTransposeA>
HWY_INLINE void multiply_rows(int64_t row, int64_t columns, int64_t k_begin, int64_t k_end,
                              Matrix a, Matrix b, Matrix c, bool accumulate) {
  const hn::ScalableTag<float> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float* a_rows =
      a.data + (kTransposeA ? k_begin * a.stride + row : row * a.stride + k_begin);
  const float* b_rows = b.data + k_begin * b.stride;
  float* c_rows = c.data + row * c.stride;
  const int64_t K = k_end - k_begin;
  int64_t j = 0;
  for (; j + lanes < columns; j += 2 * lanes) {
    multiply_tile<kRows, 2, kTransposeA>(K, a_rows, a.stride, b_rows + j, b.stride, c_rows + j,
                                         c.stride, accumulate);
  }
  for (; j < columns; j += lanes) {
    multiply_tile<kRows, 1, kTransposeA>(K, a_rows, a.stride, b_rows + j, b.stride, c_rows + j,
                                         c.stride, accumulate);
  }
}

// Which part of a product is wanted when rows and columns are the (t, r) of a chunk.
enum class Causal {
  none,        // all of it
  columns,     // C is lower triangular in blocks of R: columns of later tokens are left alone
  inner,       // op(A) is lower triangular in blocks of R
  inner_upper  // op(A) is upper triangular in blocks of R (a transposed lower triangle)
};

// C (M, columns) = op(A) B, or += with `accumulate`; op(A) is (M, K), A itself (K, M) if
// transposed.
template <bool kTransposeA, Causal kCausal = Causal::none>
HWY_NOINLINE void multiply(int64_t M, int64_t columns, int64_t K, Matrix a, Matrix b, Matrix c,
                           bool accumulate, int64_t R = 1) {
  int64_t row = 0;
  const auto rows = [&](auto count) HWY_ATTR {
    constexpr int kRows = decltype(count)::value;
    for (; row + kRows <= M; row += kRows) {
      const int64_t end = (row + kRows - 1) / R * R + R;  // one past the last token's rows
      const int64_t last_column = kCausal == Causal::columns ? HWY_MIN(columns, end) : columns;
      const int64_t k_begin = kCausal == Causal::inner_upper ? row / R * R : 0;
      const int64_t k_end = kCausal == Causal::inner ? HWY_MIN(K, end) : K;
      multiply_rows<kRows, kTransposeA>(row, last_column, k_begin, k_end, a, b, c, accumulate);
    }
  };
  rows(std::integral_constant<int, kTileRows>());
  if constexpr (kTileRows > 4) rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
}

// out (columns, rows) = in^T for in (rows, columns); pads the rows of `out` up to `padded` with
// zeros.
HWY_INLINE void transpose(int64_t rows, int64_t columns, Matrix in, Matrix out, int64_t padded) {
  constexpr int64_t kBlock = 8;
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t i_end = HWY_MIN(rows, i + kBlock);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = i; k < i_end; ++k) out.data[j * out.stride + k] = in.data[k * in.stride + j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t k = rows; k < padded; ++k) out.data[j * out.stride + k] = 0;
  }
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_SMALL_GEMM_INL_H_
