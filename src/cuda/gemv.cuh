#pragma once

// y = x weight^T for one row of x, or up to four, which is bound by reading the weight.
//
// The schedule: a group of `warps` warps makes Tile::kOutputs outputs, which are rows of the
// weight. Every lane asks for Tile::kLoads pieces of 16 bytes of each of them before it uses any,
// and uses each for all rows of x, which come from the cache. Enough bytes are on their way only if
// many such groups are on a multiprocessor at once; so blocks are small and registers few.

#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"

namespace mamba3::cuda {

struct Gemv {
  const void* x;
  int64_t x_stride;
  const void* weight;
  const float* bias;  // or null
  void* y;
  int64_t y_stride;
  int64_t N, K;  // N of y; with SwiGLU the weight has 2N rows, values and gates
  int warps;     // that share outputs: 1, 2, 4 or 8
  bool accumulate;
};

// What a lane asks for at once: loads of each of so many outputs. kBlocks: how many blocks of
// kWarps a multiprocessor should hold at least, which bounds the registers.
template <int outputs, int loads, int blocks, int warps = 8>
struct GemvTile {
  static constexpr int kOutputs = outputs, kLoads = loads, kBlocks = blocks, kWarps = warps;
};

// n elements as they are loaded: 16 bytes, or one element. Not a Pack, whose elements of bf16 would
// each have a register until they are used.
template <typename T, int n>
using Piece = std::conditional_t<n == 1, T, uint4>;

template <typename T>
__device__ void load_piece(const T* from, T& piece) {
  piece = *from;
}
template <typename T>
__device__ void load_piece(const T* from, uint4& piece) {
  piece = load_weight(from);
}

template <typename T>
__device__ void to_floats(T piece, float (&to)[1]) {
  to[0] = to_float(piece);
}
__device__ inline void to_floats(uint4 piece, float (&to)[4]) {
  to[0] = __uint_as_float(piece.x), to[1] = __uint_as_float(piece.y);
  to[2] = __uint_as_float(piece.z), to[3] = __uint_as_float(piece.w);
}
__device__ inline void to_floats(uint4 piece, float (&to)[8]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a bf16 is the upper half of a float
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// What a lane makes: sums over its part of k of kOutputs rows of the weight for kM rows of x.
template <typename T, int kM, int kOutputs, int kEach>
struct GemvSums {
  static constexpr int kStep = kWarp * kEach;  // between the pieces of a lane
  using In = Piece<T, kEach>;

  float at[kOutputs * kM] = {};

  __device__ void add(const In (&pieces)[kOutputs], const T* x, int64_t x_stride, bool inside) {
    float w[kOutputs][kEach];
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) to_floats(pieces[o], w[o]);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      In in{};
      if (inside) in = *reinterpret_cast<const In*>(x + m * x_stride);
      float v[kEach];
      to_floats(in, v);
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) at[o * kM + m] = fmaf(w[o][j], v[j], at[o * kM + m]);
      }
    }
  }
};

// y[m, n] for all m and the outputs n of a block. kEach elements are loaded at once. With SwiGLU
// half of a block's groups of warps have the gates of the other half's values.
template <typename T, typename Y, int kM, int kEach, typename Tile, bool kSwiglu>
__global__ void __launch_bounds__(Tile::kWarps* kWarp, Tile::kBlocks) gemv(Gemv g) {
  constexpr int kOutputs = Tile::kOutputs, kLoads = Tile::kLoads, kSums = kM * kOutputs;
  static_assert(kSums <= kWarp);
  using Sums = GemvSums<T, kM, kOutputs, kEach>;
  constexpr int kStep = Sums::kStep, kPart = kLoads * kStep;
  __shared__ float parts[Tile::kWarps][kSums];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int part = warp % g.warps;
  const int groups = Tile::kWarps / g.warps / (kSwiglu ? 2 : 1);  // of outputs of y
  const bool gate = kSwiglu && warp / g.warps >= groups;
  const int64_t n0 =
      (static_cast<int64_t>(blockIdx.x) * groups + warp / g.warps % groups) * kOutputs;
  int64_t left = g.K - part * kPart;  // of k from here on
  const T* x = static_cast<const T*>(g.x) + part * kPart + lane * kEach;
  const T* weight[kOutputs];  // an output beyond the last is the last once more
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    const int64_t row = min(n0 + o, g.N - 1) + (gate ? g.N : 0);
    weight[o] = static_cast<const T*>(g.weight) + row * g.K + part * kPart + lane * kEach;
  }
  let_next_kernel_start();

  Sums sums;
  bool waited = false;
  const int64_t turn = static_cast<int64_t>(g.warps) * kPart;
  for (; left >= kPart; left -= turn, x += turn) {
    typename Sums::In pieces[kLoads][kOutputs];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) load_piece(weight[o] + i * kStep, pieces[i][o]);
    }
    if (!waited) wait_for_earlier_kernels();
    waited = true;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) sums.add(pieces[i], x + i * kStep, g.x_stride, true);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) weight[o] += turn;
  }
  // A last part that is not whole. What a lane has beyond it is 0, without a branch, which would
  // make a load wait for the one before.
  constexpr int kTail = kLoads;
  for (; left > 0 && left < kPart; left -= kTail * kStep, x += kTail * kStep) {
    typename Sums::In pieces[kTail][kOutputs] = {};
#pragma unroll
    for (int i = 0; i < kTail; ++i) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        if (i * kStep + lane * kEach < left) load_piece(weight[o] + i * kStep, pieces[i][o]);
      }
    }
    if (!waited) wait_for_earlier_kernels();
    waited = true;
#pragma unroll
    for (int i = 0; i < kTail; ++i) {
      sums.add(pieces[i], x + i * kStep, g.x_stride, i * kStep + lane * kEach < left);
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) weight[o] += kTail * kStep;
  }
  if (!waited) wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const float sum = warp_sum(sums.at[i]);
    if (lane == 0) parts[warp][i] = sum;
  }
  __syncthreads();
  const int64_t n = n0 + lane / kM;
  if (part > 0 || gate || lane >= kSums || n >= g.N) return;
  const auto sum_from = [&](int first) {
    float sum = parts[first][lane];
    for (int i = 1; i < g.warps; ++i) sum += parts[first + i][lane];
    return sum;
  };
  float sum = sum_from(warp);
  if constexpr (kSwiglu) sum *= silu(sum_from(warp + groups * g.warps));
  if (g.bias != nullptr) sum += g.bias[n];
  Y& y = static_cast<Y*>(g.y)[lane % kM * g.y_stride + n];
  y = from_float<Y>(g.accumulate ? to_float(y) + sum : sum);
}

// How many warps share outputs.
template <typename Tile>
int gemv_warps(int64_t K, int each) {
  int warps = 1;
  while (warps < Tile::kWarps && warps * Tile::kLoads * kWarp * each < K) warps *= 2;
  return warps;
}

template <typename T, typename Y, int kM, int kEach, typename Tile, bool kSwiglu = false>
void launch_gemv(Context& ctx, const char* op, Gemv g) {
  g.warps = gemv_warps<Tile>(g.K, kEach);
  const int groups = Tile::kWarps / g.warps / (kSwiglu ? 2 : 1);
  launch_overlapping(
      ctx, op, gemv<T, Y, kM, kEach, Tile, kSwiglu>,
      {.blocks = {blocks_for(g.N, groups * Tile::kOutputs)}, .threads = {Tile::kWarps * kWarp}}, 1,
      g);
}

}  // namespace mamba3::cuda
