// Schedule. A block has a few tokens of a batch row and up to kPairs pairs of each head. First its
// threads form the cosines and sines of those, once for all heads, in double: turns are counted in
// half turns, whose whole ones sincospi() takes out exactly. Then they turn the pairs, packs of
// neighbours at a time.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"
#include "cuda/packed.cuh"
#include "ops/rotary.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPairs = 128;    // of a head
constexpr int kAngles = 1024;  // of a block, tokens times pairs
constexpr int kPacksOfThread = 4;

struct Turn {
  void* x;
  int64_t batch, time;  // strides
  Sequences sequences;
  const int32_t* start;  // (sequences), or null
  double log2_base;
  int64_t d;
  int heads, half;  // half of dims: the pairs of a head
  int tokens;       // of a block
  int64_t tiles;    // of so many tokens, in a row of the batch
  bool inverse;
};

// The angle of pair i of a token, in half turns.
__device__ inline double half_turns(const Turn& a, int64_t b, int t, int i) {
  const bool packed = a.sequences.cu_seqlens != nullptr;
  const int64_t sequence = packed ? a.sequences.index_of(t) : b;
  int64_t position = packed ? t - a.sequences.cu_seqlens[sequence] : t;
  if (a.start != nullptr) position += a.start[sequence];
  const double frequency = exp2(-a.log2_base * i / a.half);
  return static_cast<double>(a.inverse ? -position : position) * (frequency * std::numbers::inv_pi);
}

template <int n, typename T>
__global__ void __launch_bounds__(kThreads) turn(Turn a) {
  __shared__ __align__(32) float cosines[kAngles], sines[kAngles];  // (tokens, pairs)
  const int first = static_cast<int>(blockIdx.y) * kPairs, pairs = min(kPairs, a.half - first);
  const int64_t b = blockIdx.x / a.tiles;
  const int t0 = static_cast<int>(blockIdx.x % a.tiles) * a.tokens;
  const int tokens = min(a.tokens, a.sequences.T - t0);
  let_next_kernel_start();
  wait_for_earlier_kernels();
  for (int i = static_cast<int>(threadIdx.x); i < tokens * pairs; i += kThreads) {
    double sine, cosine;
    sincospi(half_turns(a, b, t0 + i / pairs, first + i % pairs), &sine, &cosine);
    cosines[i] = static_cast<float>(cosine);
    sines[i] = static_cast<float>(sine);
  }
  __syncthreads();
  T* const rows = static_cast<T*>(a.x) + b * a.batch + t0 * a.time + first;
  const int packs = pairs / n;  // of a head
  for (int i = static_cast<int>(threadIdx.x); i < tokens * a.heads * packs; i += kThreads) {
    const int pack = i % packs * n, head = i / packs % a.heads, row = i / packs / a.heads;
    T* const x = rows + row * a.time + head * a.d + pack;
    float u[n], v[n], c[n], s[n];
    load(x, u);
    load(x + a.half, v);
    load(cosines + row * pairs + pack, c);
    load(sines + row * pairs + pack, s);
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float before = u[k];
      u[k] = before * c[k] - v[k] * s[k];
      v[k] = before * s[k] + v[k] * c[k];
    }
    store(u, x);
    store(v, x + a.half);
  }
}

// Tokens of a block, so that its threads have a few packs each, but there are blocks for the whole
// GPU.
int tokens_of_block(const Context& ctx, int64_t tokens, int64_t packs_of_token, int64_t pairs) {
  const int64_t share = tokens / (4 * ctx.stream->multiprocessors);
  const int64_t most = std::min(kThreads * kPacksOfThread / packs_of_token, kAngles / pairs);
  return static_cast<int>(std::clamp<int64_t>(share, 1, std::max<int64_t>(1, most)));
}

}  // namespace

void rotary(Context& ctx, const RotaryArgs& args) {
  const int64_t B = args.x.dim(0), T = args.x.dim(1), half = args.dims / 2;
  const int64_t heads = args.x.dim(2) / args.d;
  if (B == 0 || T == 0 || heads == 0) return;
  visit_activation(args.x.dtype, [&]<typename Act>() {
    const auto views = {args.x.select(0, 0), args.x.select(1, 0)};
    visit_packs<16 / sizeof(Act)>(std::gcd(half, args.d), views, [&]<int n>() {
      const int64_t pairs = std::min<int64_t>(half, kPairs);
      const int tokens = tokens_of_block(ctx, B * T, heads * (pairs / n), pairs);
      const int64_t tiles = (T + tokens - 1) / tokens;
      const Turn turn_args{.x = args.x.data,
                           .batch = args.x.stride(0),
                           .time = args.x.stride(1),
                           .sequences = sequences_of(args.cu_seqlens, T),
                           .start = data<int32_t>(args.start),
                           .log2_base = std::log2(args.base),
                           .d = args.d,
                           .heads = static_cast<int>(heads),
                           .half = static_cast<int>(half),
                           .tokens = tokens,
                           .tiles = tiles,
                           .inverse = args.inverse};
      launch_overlapping(ctx, "rotary", turn<n, Act>,
                         {.blocks = {static_cast<unsigned>(B * tiles), blocks_for(half, kPairs)},
                          .threads = {kThreads}},
                         1, turn_args);
    });
  });
}

}  // namespace mamba3::cuda
