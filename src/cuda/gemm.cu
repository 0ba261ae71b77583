#include "cuda/cublas.h"
#include "cuda/gemm.h"
#include "cuda/pack.cuh"

namespace mamba3::cuda {

namespace {

constexpr int kTile = 64, kDepth = 16, kSide = 16, kEach = kTile / kSide;

// A tile (kDepth, kTile) of a matrix whose element (k, i) is at k * k_stride + i * i_stride, where
// one of the strides is 1: neighbouring threads read along it. Outside of (K, size) it is 0.
template <typename T>
__device__ void load_tile(const T* matrix, int64_t k_stride, int64_t i_stride, int64_t k0,
                          int64_t i0, int64_t K, int64_t size, float (&tile)[kDepth][kTile + 1]) {
  const int thread = static_cast<int>(threadIdx.y) * kSide + static_cast<int>(threadIdx.x);
#pragma unroll
  for (int item = thread; item < kDepth * kTile; item += kSide * kSide) {
    const int k = k_stride == 1 ? item % kDepth : item / kTile;
    const int i = k_stride == 1 ? item / kDepth : item % kTile;
    const bool inside = k0 + k < K && i0 + i < size;
    tile[k][i] = inside ? to_float(matrix[(k0 + k) * k_stride + (i0 + i) * i_stride]) : 0.0f;
  }
}

// A block makes a tile of C, a thread the elements of it that are kSide apart in both directions.
template <typename T, typename C>
__global__ void __launch_bounds__(kSide* kSide) tiled_gemm(Gemm gemm) {
  __shared__ float tile_a[kDepth][kTile + 1], tile_b[kDepth][kTile + 1];
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t n0 = static_cast<int64_t>(blockIdx.y) * kTile;
  float sums[kEach][kEach] = {};
  for (int64_t k0 = 0; k0 < gemm.K; k0 += kDepth) {
    load_tile(static_cast<const T*>(gemm.a), gemm.transpose_a ? gemm.lda : 1,
              gemm.transpose_a ? 1 : gemm.lda, k0, m0, gemm.K, gemm.M, tile_a);
    load_tile(static_cast<const T*>(gemm.b), gemm.transpose_b ? 1 : gemm.ldb,
              gemm.transpose_b ? gemm.ldb : 1, k0, n0, gemm.K, gemm.N, tile_b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        a[i] = tile_a[k][threadIdx.y + i * kSide];
        b[i] = tile_b[k][threadIdx.x + i * kSide];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t m = m0 + threadIdx.y + i * kSide;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t n = n0 + threadIdx.x + j * kSide;
      if (m >= gemm.M || n >= gemm.N) continue;
      C& c = static_cast<C*>(gemm.c)[m * gemm.ldc + n];
      c = from_float<C>(gemm.beta == 0 ? sums[i][j] : gemm.beta * to_float(c) + sums[i][j]);
    }
  }
}

}  // namespace

void gemm(Context& ctx, const char* op, const Gemm& gemm) {
  if (gemm.M == 0 || gemm.N == 0) return;
  if (gemm.K > 0) {
    auto& cublas = ctx.stream->cublas;
    if (cublas == nullptr) cublas = std::make_shared<Cublas>();
    if (cublas->gemm(ctx, op, gemm)) return;
  }
  visit_activation(gemm.dtype, [&]<typename T>() {
    visit_activation(gemm.dtype_c, [&]<typename C>() {
      launch(ctx, op, tiled_gemm<T, C>,
             {.blocks = {blocks_for(gemm.M, kTile), blocks_for(gemm.N, kTile)},
              .threads = {kSide, kSide}},
             gemm);
    });
  });
}

}  // namespace mamba3::cuda
