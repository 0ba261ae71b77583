#pragma once

// The Mamba-3 scan on tensor cores, in bf16 with f32 sums: what its kernels share.
//
// A chunk has 64 rows (t, r), those of Q = 64 / R tokens, so that its products are tiles of 64 rows
// (mma.cuh). For SISO (R = 1) a row is a token. What a chunk needs of its tokens and heads is
// computed first (fill_tiles()). Heads wider than 64 are taken as blocks of 64 channels, which
// share keys and queries and are otherwise like heads of their own.
//
// A span is a run of chunks of one sequence that a thread block walks with the state in registers.
// A sequence has several where there are too few heads to fill the GPU; then a first pass finds
// what each span adds to the state, walk_spans() turns that into the state that comes in to each,
// and the pass that writes outputs starts from there.

#include "cuda/mixer_segment.cuh"
#include "cuda/mma.cuh"
#include "cuda/pack.cuh"
#include "cuda/warpgroup.cuh"
#include "ops/mixer_scan.h"

namespace mamba3::cuda {

inline constexpr int kTileRows = 64;      // of a chunk
inline constexpr int kTileChannels = 64;  // of a head's block
inline constexpr int kSpanThreads = 128;  // 4 warps with 16 rows each
inline constexpr int kSpanBlocks = 2;     // on a multiprocessor: a third one makes registers spill
inline constexpr int kWarpRows = 16;
inline constexpr int kAngles = kTileRows / kWarpRows;  // of a chunk that are stored

struct MixerSpan {
  int begin, end;  // chunks
  int rows;
  bool alone;  // it is the whole sequence
};

// What the first kernels find of the tokens of a chunk for a head, in every row of a token. Of
// absent tokens c and from_start are those of the last one, and the rest is zero.
struct ChunkTerms {
  float c[kTileRows];      // sum of A dt from the start of the chunk, times log2(e)
  float scale[kTileRows];  // lam_t dt_t + (1 - lam_{t+1}) dt_{t+1}
  float gamma[kTileRows];  // lam_t dt_t
  float dt[kTileRows];
  float from_start[kTileRows];  // 2^c_t
  float to_end[kTileRows];      // 2^(c_Q - c_t) scale_t
};

// What the kernels get: that of all chunks, or of a part of them (part_of()). Of the segment only
// theta, what counts chunks, and rstd is there, the last as (count, rows, 2, G).
struct MixerTiles {
  MixerSegment m;
  int blocks;             // of 64 channels in a head
  ChunkTerms* terms;      // (count, H)
  __half* normed;         // (count, rows, 2, G, N) B and C after their norms, in the order of
                          // tiles; zero when absent
  float* angle;           // (count, kAngles, H, S) before each 16 rows
  MixerSpan* spans;       // in order of time
  int32_t* span_offsets;  // (sequences + 1) number of the first span of each
  int span_count;         // an upper bound when sequences are packed
  float* incoming;        // (spans, H, P, N) state before the span; first what it adds
  float* span_decay;      // (spans, H) what is left of that state after the span
  // The same of its gradient, which comes from the span after it. Null in a forward.
  float *d_incoming, *d_span_decay;
  float* d_initial = nullptr;  // (sequences, H, P, N) that of the state before each; or null

  __device__ ChunkTerms* terms_of(int64_t chunk, int h) const { return terms + chunk * m.s.H + h; }
  // The rows of B (which = 0) or C of a group in a chunk; the next token is normed_stride() later.
  __device__ const __half* normed_of(int64_t chunk, int which, int group) const {
    return normed + ((chunk * kTileRows * 2 + which) * m.s.G + group) * m.s.N;
  }
  __device__ int64_t normed_stride() const { return 2 * m.s.G * m.s.N; }
};

// A pool of states whose ssm is f32 or bf16.
struct MixerStatePool {
  MixerPool<float> pool;
  bf16* ssm_bf16;  // instead of pool.ssm

  __device__ bool empty() const { return !pool.ssm && !ssm_bf16; }
  __device__ float ssm(int64_t i) const { return ssm_bf16 ? to_float(ssm_bf16[i]) : pool.ssm[i]; }
  __device__ void set_ssm(int64_t i, float value) const {
    if (ssm_bf16) {
      ssm_bf16[i] = from_float<bf16>(value);
    } else {
      pool.ssm[i] = value;
    }
  }
};

// Channels lie in tiles, and in `normed`, in another order. The two of a rotated pair come side by
// side, as they are for SISO; MIMO's are halves: places 2i and 2i+1 are channels i and i + N/2.
template <int kN, int kR>
__host__ __device__ constexpr int channel_at(int place) {
  return kR == 1 ? place : place / 2 + place % 2 * (kN / 2);
}
// And blocks of 16 places, of which the even ones come first, are the columns of a tile, so that
// both halves have rotated channels.
template <int kN>
__host__ __device__ constexpr int place_of(int column) {
  const int half = column / (kN / 2), within = column % (kN / 2);
  return within / 16 * 32 + half * 16 + within % 16;
}
template <int kN>
__host__ __device__ constexpr int column_of(int place) {
  return place / 16 % 2 * (kN / 2) + place / 32 * 16 + place % 16;
}

// The kEach places from lane * kEach on of a row (N) of channels, a warp the whole row.
template <int kR, int kEach, typename T>
__device__ void load_places(const T* row, float (&values)[kEach]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kR == 1) {
    load<kEach>(row + lane * kEach, values);
  } else {
    float halves[2][kEach / 2];
    load<kEach / 2>(row + lane * (kEach / 2), halves[0]);
    load<kEach / 2>(row + (kWarp + lane) * (kEach / 2), halves[1]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = halves[i % 2][i / 2];
  }
}
template <int kR, int kEach, typename T>
__device__ void store_places(const float (&values)[kEach], T* row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  if constexpr (kR == 1) {
    store(values, row + lane * kEach);
  } else {
    float halves[2][kEach / 2];
#pragma unroll
    for (int i = 0; i < kEach; ++i) halves[i % 2][i / 2] = values[i];
    store(halves[0], row + lane * (kEach / 2));
    store(halves[1], row + (kWarp + lane) * (kEach / 2));
  }
}

// The biases of a head's keys and queries, in shared memory.
template <int kN, int kR>
struct SharedBiases {
  // A few more, so that the ranks are in different banks.
  static constexpr int kRow = kN / 2 + (kR > 1 ? 4 : 0);
  __half2 of[2][kR * kRow];  // of B and of C, pairs of places of each rank

  __device__ void fill(const MixerSegment& m, int h) {
    for (int i = static_cast<int>(threadIdx.x); i < kR * kN; i += static_cast<int>(blockDim.x)) {
      const int which = i / (kR * kN / 2), r = i / (kN / 2) % kR, pair = i % (kN / 2);
      const float* from = (which ? m.w.C_bias : m.w.B_bias) + (h * kR + r) * kN;
      of[which][r * kRow + pair] = __floats2half2_rn(from[channel_at<kN, kR>(2 * pair)],
                                                     from[channel_at<kN, kR>(2 * pair + 1)]);
    }
  }
};

// What a lane needs to find the angles of the tokens of 16 rows of a chunk, or of a half of these
// tokens, on its way from memory: the loads are asked for well before their use, and stay where
// they stand.
template <int kS, int kR, int kParts = 1>
struct AngleSteps {
  static_assert(kParts <= 2);
  static constexpr int kEach = (kS + kWarp - 1) / kWarp;  // lane + 32 e
  static constexpr int kTokens = kWarpRows / kR / kParts;
  float before[kEach == 0 ? 1 : kEach];
  float earlier[kEach == 0 ? 1 : kEach][kTokens];  // steps of the first half, for the second
  float step[kEach == 0 ? 1 : kEach][kTokens];

  __device__ void load(const MixerTiles& g, int64_t chunk, int h, int row, int part = 0) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane >= kS) return;
    const float* angle = g.angle + ((chunk * kAngles + row / kWarpRows) * g.m.s.H + h) * kS + lane;
    const float* theta = g.m.theta + (chunk * kTileRows + row) / kR * kS + lane;
    const float* const own = theta + part * (kTokens * kS);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      before[e] = load_constant(angle + e * kWarp);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        earlier[e][t] = part > 0 ? load_constant(theta + t * kS + e * kWarp) : 0.0f;
        step[e][t] = load_constant(own + t * kS + e * kWarp);
      }
    }
  }
};

// cos and sin of the angles of a chunk's tokens in shared memory, as halves, which keep more than
// the bf16 of a turned key: 32 angles in the place of 64 columns of a SharedTile, row for token.
template <int kS, int kR>
struct SharedRotary {
  static constexpr int kPanelBytes = kTileRows / kR * SharedTile<64>::kRowBytes;
  static constexpr int kBytes = (kS + 31) / 32 * kPanelBytes;
  uint32_t base;

  // Of i + 8 half + more: i is a multiple of 4 without 8, and 0 <= more < 4. Permuted by token as a
  // tile is by row.
  __device__ uint32_t at(int t, int i, int half, int more) const {
    const uint32_t start =
        base + static_cast<uint32_t>(t * SharedTile<64>::kRowBytes + (t & 7) * 16 + more * 4);
    return (start ^ static_cast<uint32_t>(half * 32) ^ static_cast<uint32_t>(i % 32 * 4)) +
           static_cast<uint32_t>(i / 32 * kPanelBytes);
  }
  __device__ __half2 cos_sin(int row, int i, int half, int more) const {
    const uint32_t both = load_shared(at(row / kR, i, half, more));
    return *reinterpret_cast<const __half2*>(&both);
  }

  // The 16 rows from `row` of a chunk, or the part of their tokens that the steps are of.
  template <int kParts>
  __device__ void fill(const AngleSteps<kS, kR, kParts>& steps, const ChunkTerms& terms, int row,
                       int part = 0) const {
    using Steps = AngleSteps<kS, kR, kParts>;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int first = row / kR + part * Steps::kTokens;
    if (lane >= kS) return;
    const uint32_t start = base + static_cast<uint32_t>(first * SharedTile<64>::kRowBytes);
#pragma unroll
    for (int e = 0; e < Steps::kEach; ++e) {
      float phi = steps.before[e];
#pragma unroll
      for (int t = 0; t < Steps::kTokens && kParts > 1; ++t) {
        phi = fmaf(steps.earlier[e][t], terms.dt[row + t * kR], phi);
      }
#pragma unroll
      for (int t = 0; t < Steps::kTokens; ++t) {
        phi = fmaf(steps.step[e][t], terms.dt[(first + t) * kR], phi);
        // The instructions count in turns and drop whole ones, so that a large angle loses no more
        // than its own rounding.
        const __half2 both = __floats2half2_rn(__cosf(phi), __sinf(phi));
        // at(first + t, lane + 32 e), where `first` is a multiple of kTokens
        const uint32_t place =
            static_cast<uint32_t>(lane * 4) ^
            static_cast<uint32_t>((Steps::kTokens < 8 ? first + t & 7 : t & 7) * 16);
        store_shared(
            start + place + static_cast<uint32_t>(t * SharedTile<64>::kRowBytes + e * kPanelBytes),
            *reinterpret_cast<const uint32_t*>(&both));
      }
    }
  }
};

__device__ inline uint32_t as_bf16(__half2 pair) {
  const float2 values = __half22float2(pair);
  return pack_bf16(values.x, values.y);
}
// The pair (a, b) turned by the angle of cos and sin.
__device__ inline __half2 turned(__half2 pair, __half2 cos_sin) {
  const __half2 sines = __high2half2(cos_sin);
  uint32_t signed_sines = *reinterpret_cast<const uint32_t*>(&sines) ^ 0x8000u;  // (-sin, sin)
  return __hfma2(pair, __low2half2(cos_sin),
                 __hmul2(__lowhigh2highlow(pair), *reinterpret_cast<__half2*>(&signed_sines)));
}

// Turns normed B into keys and normed C into queries, in bf16: the fragments of the 16 rows from
// `row` and the 16 columns from `column`, either of which may be left out.
template <bool kKeys, bool kQueries, int kN, int kS, int kR>
__device__ void turn(FragmentA* k, FragmentA* q, int column, const SharedBiases<kN, kR>& biases,
                     const SharedRotary<kS, kR>& rotary, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, r = row + lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the 16 columns
    const int place = place_of<kN>(column), pair = place / 2 + 4 * half;
    const int bias = r % kR * SharedBiases<kN, kR>::kRow + pair + c;  // R divides 8
#pragma unroll
    for (int low = 0; low < 2; ++low) {  // and of the 16 rows
      __half2 cos_sin{};
      if (place < 2 * kS) cos_sin = rotary.cos_sin(r + 8 * low, pair & ~8, pair / 8 % 2, c);
      const auto one = [&](FragmentA& f, int which) {
        uint32_t& at = f.at[2 * half + low];
        __half2 x = __hadd2(*reinterpret_cast<const __half2*>(&at), biases.of[which][bias]);
        if (place < 2 * kS) x = turned(x, cos_sin);
        at = as_bf16(x);
      };
      if constexpr (kKeys) one(*k, 0);
      if constexpr (kQueries) one(*q, 1);
    }
  }
}

// The part of a thread in copies of kRows rows of kColumns 16-bit elements to a tile, which all
// kThreads threads of a block share. It points at its first piece in memory.
template <int kColumns, typename Element, int kThreads = kSpanThreads, int kRows = kTileRows>
struct TileCopy {
  static_assert(sizeof(Element) == 2);
  static constexpr int kPieces = kColumns / 8, kStep = kThreads / kPieces;
  static_assert(kStep % 8 == 0, "so that the permutation of a thread's rows is the same");

  const Element* from;
  int64_t stride;

  int row, column;
  __device__ TileCopy(const Element* first_row, int64_t row_stride,
                      int thread = static_cast<int>(threadIdx.x))
      : stride(row_stride), row(thread / kPieces), column(thread % kPieces * 8) {
    from = first_row + row * row_stride + column;
  }

  // Rows from `present` on become zeros.
  __device__ void operator()(const SharedTile<kColumns>& to, int present = kRows) const {
    const uint32_t target = to.at(row, column);
    const Element* source = from;
#pragma unroll
    for (int i = 0; i < (kRows + kStep - 1) / kStep; ++i) {
      if (kRows % kStep > 0 && row + i * kStep >= kRows) break;
      // Of an absent token not even the address is used.
      copy_async(target + static_cast<uint32_t>(i * kStep * SharedTile<kColumns>::kRowBytes),
                 source, row + i * kStep < present ? 16 : 0);
      source += kStep * stride;
    }
  }
  __device__ void move(int chunks) {
    from += chunks * (kRows * stride);
  }
};

__device__ inline void copy_terms(ChunkTerms& to, const ChunkTerms* from) {
  const uint32_t piece = threadIdx.x * 16;
  if (piece < sizeof(ChunkTerms)) {
    copy_async(shared_address(&to) + piece, reinterpret_cast<const char*>(from) + piece, 16);
  }
}

// The state of a head's block in fragments: a warp has 16 of its 64 rows (p) and all N columns.
template <int kN, int kR>
struct StateFragments {
  int row0;  // of the warp
  FragmentC tile[kN / 8];

  __device__ int row() const {  // and 8 more
    return row0 + static_cast<int>(threadIdx.x) % kWarp / 4;
  }
  __device__ static int channel(int i, int more) {
    return channel_at<kN, kR>(place_of<kN>(8 * i) + static_cast<int>(threadIdx.x) % 4 * 2 + more);
  }

  // f(value, p, n) for every element.
  template <typename Function>
  __device__ void for_each(const Function& f) {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(tile[i].at[j], row() + j / 2 * 8, channel(i, j % 2));
    }
  }
  __device__ void scale(float factor) {
    for_each([&](float& value, int, int) { value *= factor; });
  }
  // Adds sum_t weight_t v_t k_t^T over the rows t of a chunk. The tiles are in use, and the sums
  // not there, until finish().
  __device__ void add(const SharedTile<kTileChannels>& v, const SharedTile<kN>& k,
                      const float (&weight)[kTileRows]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    FragmentA a[kTileRows / 16];
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) a[i] = weighted(v, weight, 16 * i);
    begin_products();
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      multiply_async<true>(tile, a[i], rows_of(k, 16 * i), true);
    }
    commit_products();
#else
#pragma unroll
    for (int t = 0; t < kTileRows; t += 16) {
      const FragmentA a = weighted(v, weight, t);
#pragma unroll
      for (int n = 0; n < kN; n += 16) {
        const auto b = k.b(t, n);
        mma(tile[n / 8], a, b.left);
        mma(tile[n / 8 + 1], a, b.right);
      }
    }
#endif
  }
  __device__ void finish() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    wait_products<0>();
#endif
  }
  // Rounded, as rows p of a tile. A warp writes its own 16 rows.
  __device__ void store(const SharedTile<kN>& to) const {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      to.store_c(row0, 8 * i, tile[i]);
    }
  }

 private:
  // The warp's columns of v as rows, of the 16 rows from t on, times their weights.
  __device__ FragmentA weighted(const SharedTile<kTileChannels>& v,
                                const float (&weight)[kTileRows], int t) const {
    const int c = static_cast<int>(threadIdx.x) % 4;
    const float2 low = *reinterpret_cast<const float2*>(&weight[t + 2 * c]);
    const float2 high = *reinterpret_cast<const float2*>(&weight[t + 2 * c + 8]);
    FragmentA a = v.a_transposed(t, row0);
    a.at[0] = multiply_bf16(a.at[0], low.x, low.y);
    a.at[1] = multiply_bf16(a.at[1], low.x, low.y);
    a.at[2] = multiply_bf16(a.at[2], high.x, high.y);
    a.at[3] = multiply_bf16(a.at[3], high.x, high.y);
    return a;
  }
};

// A thread block of a grid of blocks of heads, and of spans or chunks. The heads are the fastest:
// neighbours share B and C.
struct HeadBlock {
  int index, h, block;  // of span or chunk; head; its block of channels

  // blockIdx.x counts both.
  __device__ explicit HeadBlock(const MixerTiles& g)
      : HeadBlock(g, static_cast<int>(blockIdx.x) / (static_cast<int>(g.m.s.H) * g.blocks),
                  static_cast<int>(blockIdx.x) % (static_cast<int>(g.m.s.H) * g.blocks)) {}
  // blockIdx.x counts heads.
  __device__ HeadBlock(const MixerTiles& g, unsigned number)
      : HeadBlock(g, static_cast<int>(number), static_cast<int>(blockIdx.x)) {}
  __device__ HeadBlock(const MixerTiles& g, int number, int head)
      : index(number), h(g.blocks == 1 ? head : head / g.blocks), block(head - h * g.blocks) {}

  // The first element of the block in arrays (index, H, P, N).
  __device__ int64_t state_at(const MixerSegment& m, int64_t i) const {
    return ((i * m.s.H + h) * m.s.P + block * kTileChannels) * m.s.N;
  }
};

// The block's channels of a rank in a parameter (H, R, P).
__device__ inline const float* rank_of(const float* parameter, const MixerShape& s,
                                       const HeadBlock& head, int r = 0) {
  return parameter + (head.h * s.R + r) * s.P + head.block * kTileChannels;
}
// The row of a rank in k_prev (rows, R, H, N), where `row` counts (rows, H).
__device__ inline int64_t k_prev_row(const MixerShape& s, int64_t row, int r) {
  return (row / s.H * s.R + r) * s.H + row % s.H;
}

// The state with which a walk over a span begins.
template <bool kReverse = false, int kN, int kR>
__device__ void begin_span(const MixerTiles& g, const MixerSpan& span, const HeadBlock& head,
                           const MixerStatePool& pool, StateFragments<kN, kR>& state) {
  const MixerSegment& m = g.m;
  if (!span.alone) {
    const float* from = (kReverse ? g.d_incoming : g.incoming) + head.state_at(m, head.index);
    state.for_each([&](float& value, int p, int n) { value = from[p * kN + n]; });
  } else if (!pool.empty()) {
    const int64_t row = pool.pool.rows[m.chunks[span.begin].sequence] * m.s.H + head.h;
    const int64_t at = (row * m.s.P + head.block * kTileChannels) * kN;
    state.for_each([&](float& value, int p, int n) { value = pool.ssm(at + p * kN + n); });
    if constexpr (!kReverse) {
      // and what the first token adds for the last one of the call before
      const ChunkTerms& terms = *g.terms_of(span.begin, head.h);
      const float carry = terms.dt[0] - terms.gamma[0];
      const float* v = pool.pool.v_prev + row * m.s.P + head.block * kTileChannels;
      for (int r = 0; r < kR; ++r) {
        const float* up = kR == 1 ? nullptr : rank_of(m.w.mimo_x, m.s, head, r);
        const float* k = pool.pool.k_prev + k_prev_row(m.s, row, r) * kN;
        state.for_each([&](float& value, int p, int n) {
          value = fmaf(carry * v[p] * (kR == 1 ? 1 : up[p]), k[n], value);
        });
      }
    }
  } else {
    state.for_each([](float& value, int, int) { value = 0; });
  }
}

inline constexpr float kLog2e = 1.44269504f;
__device__ inline float fast_sigmoid(float x) {
  return fast_reciprocal(1 + fast_exp2(x * -kLog2e));
}

// Calls f(row, column) for the pieces of 8 columns of the 16 rows from `row` of a tile that a lane
// of a warp has.
template <typename Function>
__device__ void for_pieces(int row, const Function& f) {
  constexpr int kPieces = kTileChannels / 8, kStep = kWarp / kPieces;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int i = 0; i < kWarpRows; i += kStep) f(row + i + lane / kPieces, lane % kPieces * 8);
}

// values *= silu(gates), each thread of a block its share.
__device__ inline void gate_rows(const SharedTile<kTileChannels>& values,
                                 const SharedTile<kTileChannels>& gates) {
  constexpr int kPieces = kTileChannels / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kTileRows * kPieces;
       i += static_cast<int>(blockDim.x)) {
    const int t = i / kPieces, p = i % kPieces * 8;
    const auto gated = [](uint32_t value, uint32_t gate) {
      const float2 z = unpack_bf16(gate);
      return multiply_bf16(value, z.x * fast_sigmoid(z.x), z.y * fast_sigmoid(z.y));
    };
    const uint4 d = values.load8(t, p), z = gates.load8(t, p);
    values.store8(t, p, {gated(d.x, z.x), gated(d.y, z.y), gated(d.z, z.z), gated(d.w, z.w)});
  }
}

// The 16 rows from `row` of v_r = x mimo_x, from tokens. `up` is rank_of(mimo_x).
template <int kR>
__device__ void expand_values(const SharedTile<kTileChannels>& rows,
                              const SharedTile<kTileChannels>& tokens, const float* up, int64_t P,
                              int row) {
  for_pieces(row, [&](int i, int p) {
    float factor[8];
    load<8>(up + i % kR * P + p, factor);
    const uint4 x = tokens.load8(i / kR, p);
    rows.store8(
        i, p,
        {multiply_bf16(x.x, factor[0], factor[1]), multiply_bf16(x.y, factor[2], factor[3]),
         multiply_bf16(x.z, factor[4], factor[5]), multiply_bf16(x.w, factor[6], factor[7])});
  });
}
// The same of the gradient of y_r, d mimo_o silu(z mimo_z).
template <int kR>
__device__ void expand_gradients(const SharedTile<kTileChannels>& rows,
                                 const SharedTile<kTileChannels>& d_tokens,
                                 const SharedTile<kTileChannels>& z_tokens, const float* down,
                                 const float* gate, int64_t P, int row) {
  for_pieces(row, [&](int i, int p) {
    float o[8], g[8];
    load<8>(down + i % kR * P + p, o);
    load<8>(gate + i % kR * P + p, g);
    const uint4 d = d_tokens.load8(i / kR, p), z = z_tokens.load8(i / kR, p);
    const auto gated = [&](uint32_t value, uint32_t both, int j) {
      const float2 zs = unpack_bf16(both);
      const float a = zs.x * g[j], b = zs.y * g[j + 1];
      return multiply_bf16(value, o[j] * a * fast_sigmoid(a), o[j + 1] * b * fast_sigmoid(b));
    };
    rows.store8(i, p,
                {gated(d.x, z.x, 0), gated(d.y, z.y, 2), gated(d.z, z.z, 4), gated(d.w, z.w, 6)});
  });
}

// Sums over lanes at distances kFrom, kFrom / 2, .. kTo (multiples of 4; none where kFrom < kTo),
// of two columns in each of kTiles tiles. At each exchange a lane gives away half of the tiles that
// it still has, as far as that goes; it ends with those from the tile that is returned.
template <int kFrom, int kTo, int kTiles>
__device__ int lane_sums(float2 (&sums)[kTiles]) {
  static_assert(kTiles == 1 || kTiles % 2 == 0);
  if constexpr (kFrom < kTo) {
    return 0;
  } else if constexpr (kTiles == 1) {
    sums[0].x += __shfl_xor_sync(~0u, sums[0].x, kFrom);
    sums[0].y += __shfl_xor_sync(~0u, sums[0].y, kFrom);
    return lane_sums<kFrom / 2, kTo>(sums);
  } else {
    const bool upper = threadIdx.x & kFrom;
    float2 kept[kTiles / 2];
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) {
      const float2 low = sums[i], high = sums[i + kTiles / 2];
      const float2 given = upper ? low : high;
      kept[i] = upper ? high : low;
      kept[i].x += __shfl_xor_sync(~0u, given.x, kFrom);
      kept[i].y += __shfl_xor_sync(~0u, given.y, kFrom);
    }
    const int tile = lane_sums<kFrom / 2, kTo>(kept);
#pragma unroll
    for (int i = 0; i < kTiles / 2; ++i) sums[i] = kept[i];
    return tile + (upper ? kTiles / 2 : 0);
  }
}
// Over the rows of a token: lane / 4 counts (t, r). kLeft tiles are left.
template <int kR, int kTiles>
struct RankSums {
  static constexpr int kLeft = kTiles > kR ? kTiles / kR : 1;
  __device__ static int run(float2 (&sums)[kTiles]) { return lane_sums<2 * kR, 4>(sums); }
};
// Over the tokens of a warp's 8 lines of lanes, each rank by itself.
template <int kR, int kTiles>
struct TokenSums {
  static constexpr int kLeft = kTiles * kR > 8 ? kTiles* kR / 8 : 1;
  __device__ static int run(float2 (&sums)[kTiles]) { return lane_sums<16, 4 * kR>(sums); }
};

// Calls body.template operator()<kN, kR>() for the state sizes and ranks that have kernels, or
// body.template operator()<kN, kS, kR>() for those and the numbers of angles.
template <typename Body>
void visit_ranks(const MixerShape& s, Body&& body) {
  const auto visit_rank = [&]<int kN>() {
    switch (s.R) {
      case 1:
        return body.template operator()<kN, 1>();
      case 2:
        return body.template operator()<kN, 2>();
      case 4:
        return body.template operator()<kN, 4>();
      default:
        return body.template operator()<kN, 8>();
    }
  };
  return s.N == 64 ? visit_rank.template operator()<64>() : visit_rank.template operator()<128>();
}
template <typename Body>
void visit_tiles(const MixerShape& s, Body&& body) {
  visit_ranks(s, [&]<int kN, int kR>() {
    if constexpr (kR == 1) {
      if (s.S == 0) return body.template operator()<kN, 0, kR>();
    }
    if (s.S == kN / 4) return body.template operator()<kN, kN / 4, kR>();
    return body.template operator()<kN, kN / 2, kR>();
  });
}

MixerStatePool state_pool(const MixerState& state);

// mixer_scan() of what mixer_scan_has_tiles(); mixer_scan_backward() of that without out_norm.
void mixer_scan_tiles(Context& ctx, const MixerScanArgs& args);
void mixer_scan_backward_tiles(Context& ctx, const MixerScanBackwardArgs& args);
// Whether a block of the card has the shared memory: with S = N/2 = 64 it takes 105 KiB.
bool mixer_scan_backward_fits_tiles(const Stream& stream, const MixerShape& shape);

// Scratch for all chunks, and for spans of up to `length` chunks that are cut where a multiple of
// `segment` chunks is.
MixerTiles take_tiles(const MixerShape& shape, const MixerParams& params, const MixerChunks& chunks,
                      int64_t length, int64_t segment, bool backward, ScratchScope& scope);
// Computes the terms of all chunks, angles and spans. Angles begin from the pool; with `finish`
// they go back to it.
void fill_tiles(Context& ctx, const char* op, const MixerTiles& tiles, const MixerChunks& chunks,
                int64_t length, int64_t segment, const View& proj, const MixerState& pool,
                bool finish);
// Finds the state that comes in to each span, from that of the pool; with d_y also its gradient,
// from that of the final states.
void find_incoming(Context& ctx, const char* op, const MixerTiles& tiles, const MixerChunks& chunks,
                   const View& proj, const View* d_y, const MixerState& pool,
                   const MixerState& d_final);

// What the kernels get of a part: chunks, and what is of chunks, are counted from `first`. Spans
// are not; kernels of a part do not ask for them.
MixerTiles part_of(const MixerTiles& tiles, const MixerChunks& chunks, int64_t first,
                   int64_t count);
// The states (count, H, P, N) of a part whose ends cut no span: that before each chunk, and its
// gradient after each chunk, in the order of tiles; and d_initial of the sequences that begin in
// it.
void part_states(Context& ctx, const char* op, const MixerTiles& tiles, const MixerTiles& part,
                 const View& proj, const View& d_y, const MixerState& pool,
                 const MixerState& d_final, bf16* states, bf16* d_states);
// Turns values (count, size) of the chunks of a part into the sums of those of later chunks of a
// sequence, with `in` (size) where it goes on after the part; `out` if it began before. With `ends`
// (sequences, size) the sums of a sequence begin from there, and the whole sum replaces it.
void sum_later_chunks(Context& ctx, const char* op, const MixerTiles& part,
                      const MixerChunks& chunks, float* values, int64_t size, const float* in,
                      float* out, float* ends);

}  // namespace mamba3::cuda
