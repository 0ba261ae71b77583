#pragma once

// Products of two to eight rows of x with a weight in bf16, on tensor cores: bound by reading the
// weight.
//
// The schedule: a block makes eight outputs, rows of the weight; a warp has 256 of k. It asks for
// all of its weights at once, whole lines of them, into shared memory, and before it waits for
// earlier kernels. So much is on its way to a multiprocessor, whose blocks are as many as fit. x
// comes from the cache. The sums of the warps are added at the end.
//
// The order in which k is summed does not matter: a lane gives the eight neighbours that it reads
// to the places of two products of 16, of x and weight alike. The eight rows of x that a product of
// 16 rows has left over hold those of the other product, whose sums are not used.

#include "cuda/mma.cuh"
#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"

namespace mamba3::cuda::few_rows {

inline constexpr int kMostRows = 8;  // of x
inline constexpr int kOutputs = 8;   // of a block: rows of the weight
inline constexpr int kMostWarps = 16;
inline constexpr int kWindow = 32;  // of k: what a warp multiplies at once
inline constexpr int kWindows = 8;  // of a warp
inline constexpr int kPart = kWindows * kWindow;
inline constexpr int kWarpBytes = kOutputs * kPart * 2;  // of weights

struct Product {
  const bf16* x;
  int64_t x_stride;
  const bf16* weight;
  const float* bias;  // or null
  void* y;
  int64_t y_stride;
  int M;
  int64_t N, K;  // N of y; with SwiGLU the weight has 2N rows, values and gates
  bool accumulate = false;
};

// Where a piece of eight elements of a warp's weights lies: shifted in odd rows, so that the lanes
// that read two rows at once find them in different banks.
__device__ inline uint32_t piece_at(int row, int piece) {
  return static_cast<uint32_t>(row * kPart * 2 + (piece ^ row % 2 * 4) * 16);
}

template <bool kSwiglu, typename Y>
__global__ void __launch_bounds__(kMostWarps* kWarp, 2) multiply(Product p) {
  constexpr int kWidth = kSwiglu ? kOutputs / 2 : kOutputs;  // of y
  MAMBA3_DYNAMIC_SHARED(uint4, shared);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, row = lane / 4, quad = lane % 4;
  const int threads = static_cast<int>(blockDim.x), warps = threads / kWarp;
  const uint32_t weights = shared_address(shared) + static_cast<uint32_t>(warp * kWarpBytes);
  const int64_t begin = p.N * blockIdx.x / gridDim.x, end = p.N * (blockIdx.x + 1) / gridDim.x;
  const auto ask = [&](int64_t k) {
    k += lane * 8;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int64_t n = begin + i % kWidth;
      copy_async(weights + piece_at(i, lane), p.weight + (n + i / kWidth * p.N) * p.K + k,
                 n < end && k < p.K ? 16 : 0);
    }
  };
  let_next_kernel_start();
  ask(warp * kPart);
  wait_for_earlier_kernels();

  FragmentC low = {}, high = {};  // of each the rows of its product
  for (int64_t k = warp * kPart; k < p.K; k += warps * kPart) {
    if (k >= warps * kPart) {
      __syncwarp();
      ask(k);
    }
    uint4 x[kWindows] = {};
#pragma unroll
    for (int i = 0; i < kWindows; ++i) {
      const int64_t at = k + i * kWindow + quad * 8;
      if (row < p.M && at < p.K) {
        x[i] = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + at);
      }
    }
    wait_all_copies();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWindows; ++i) {
      const uint4 w = load_shared4(weights + piece_at(row, 4 * i + quad));
      const FragmentA rows = {{x[i].x, x[i].z, x[i].y, x[i].w}};
      mma(low, rows, {{w.x, w.y}});
      mma(high, rows, {{w.z, w.w}});
    }
  }
  __syncwarp();
  // The sums of a warp take the place of its weights: m by output.
  float* const parts = reinterpret_cast<float*>(shared);
  constexpr int kStride = kWarpBytes / 4;
  *reinterpret_cast<float2*>(parts + warp * kStride + lane * 2) = {low.at[0] + high.at[2],
                                                                   low.at[1] + high.at[3]};
  __syncthreads();
  const auto sum_of = [&](int m, int output) {
    float sum = parts[m * kOutputs + output];
    for (int i = 1; i < warps; ++i) sum += parts[i * kStride + m * kOutputs + output];
    return sum;
  };
  for (int i = static_cast<int>(threadIdx.x); i < p.M * kWidth; i += threads) {
    const int m = i / kWidth, output = i % kWidth;
    const int64_t n = begin + output;
    if (n >= end) continue;
    float sum = sum_of(m, output);
    if constexpr (kSwiglu) sum *= silu(sum_of(m, output + kWidth));
    if (p.bias != nullptr) sum += p.bias[n];
    Y& y = static_cast<Y*>(p.y)[m * p.y_stride + n];
    y = from_float<Y>(p.accumulate ? to_float(y) + sum : sum);
  }
}

// Whether there is such a product.
inline bool serves(const View& x, const View& weight) {
  return x.dim(0) <= kMostRows && weight.dtype == DType::bf16 && weight.dim(1) % 8 == 0 &&
         packs(x, 8) && packs(weight, 8);
}

template <bool kSwiglu, typename Y>
void launch_multiply(Context& ctx, const char* op, const Product& p) {
  // Where some multiprocessors would have one block more than others: as many for each.
  const unsigned each = static_cast<unsigned>(ctx.stream->multiprocessors);
  unsigned blocks = blocks_for(p.N, kSwiglu ? kOutputs / 2 : kOutputs);
  if (blocks < 4 * each) blocks = blocks_for(blocks, each) * each;
  const unsigned warps = std::min<unsigned>(kMostWarps, blocks_for(p.K, kPart));
  launch_overlapping(
      ctx, op, multiply<kSwiglu, Y>,
      {.blocks = {blocks}, .threads = {warps * kWarp}, .shared_bytes = warps * size_t{kWarpBytes}},
      1, p);
}

}  // namespace mamba3::cuda::few_rows
