#pragma once

// The Mamba-3 scan on tensor cores, in bf16 with f32 sums: what its kernels share.
//
// Chunks have 64 tokens, so that the products of a chunk are tiles of 64 rows (mma.cuh). What a
// chunk needs of its tokens and heads is computed first (fill_tiles()). Heads wider than 64 are
// taken as blocks of 64 channels, which share keys and queries and are otherwise like heads of
// their own.
//
// A span is a run of chunks of one sequence that a thread block walks with the state in registers.
// A sequence has several where there are too few heads to fill the GPU; then a first pass finds
// what each span adds to the state, walk_spans() turns that into the state that comes in to each,
// and the pass that writes outputs starts from there.

#include "cuda/mixer_segment.cuh"
#include "cuda/mma.cuh"
#include "ops/mixer_scan.h"

namespace mamba3::cuda {

inline constexpr int kTileTokens = 64;    // of a chunk
inline constexpr int kTileChannels = 64;  // of a head's block
inline constexpr int kSpanThreads = 128;  // 4 warps with 16 rows each
inline constexpr int kSpanBlocks = 2;     // on a multiprocessor: a third one makes registers spill
inline constexpr int kAngleTokens = 16;   // between two stored angles: a warp's rows
inline constexpr int kAngles = kTileTokens / kAngleTokens;  // of a chunk

struct MixerSpan {
  int begin, end;  // chunks of the segment
  int tokens;
  bool alone;  // it is the whole sequence
};

// What the first kernels find of the tokens of a chunk for a head. Of absent tokens c and
// from_start are those of the last one, and the rest is zero.
struct ChunkTerms {
  float c[kTileTokens];      // sum of A dt from the start of the chunk, times log2(e)
  float scale[kTileTokens];  // lam_t dt_t + (1 - lam_{t+1}) dt_{t+1}
  float gamma[kTileTokens];  // lam_t dt_t
  float dt[kTileTokens];
  float from_start[kTileTokens];  // 2^c_t
  float to_end[kTileTokens];      // 2^(c_Q - c_t) scale_t
};

// What the kernels get. Of the segment only theta, rstd and what counts chunks is there.
struct MixerTiles {
  MixerSegment m;
  int blocks;             // of 64 channels in a head
  ChunkTerms* terms;      // (count, H)
  __half* normed;         // (count, Q, 2, G, N) B and C after their norms, in the order of
                          // tiles; zero when absent
  float* angle;           // (count, kAngles, H, S) before each 16 tokens
  MixerSpan* spans;       // in order of time
  int32_t* span_offsets;  // (sequences + 1) number of the first span of each
  int span_count;         // an upper bound when sequences are packed
  float* incoming;        // (spans, H, P, N) state before the span; first what it adds
  float* span_decay;      // (spans, H) what is left of that state after the span

  __device__ ChunkTerms* terms_of(int64_t chunk, int h) const { return terms + chunk * m.s.H + h; }
  // The rows of B (which = 0) or C of a group in a chunk; the next token is normed_stride() later.
  __device__ const __half* normed_of(int64_t chunk, int which, int group) const {
    return normed + ((chunk * kTileTokens * 2 + which) * m.s.G + group) * m.s.N;
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

// Channels of the state lie in tiles, and in `normed`, in another order: blocks of 16 of which the
// even ones come first, so that both halves have rotated channels. Columns of tiles are places.
template <int kN>
__host__ __device__ constexpr int channel_of(int column) {
  const int half = column / (kN / 2), within = column % (kN / 2);
  return within / 16 * 32 + half * 16 + within % 16;
}
template <int kN>
__host__ __device__ constexpr int column_of(int channel) {
  return channel / 16 % 2 * (kN / 2) + channel / 32 * 16 + channel % 16;
}

// The biases of a head's keys and queries, in shared memory.
template <int kN>
struct SharedBiases {
  __half2 of[2][kN / 2];  // of B and of C

  __device__ void fill(const MixerSegment& m, int h) {
    for (int i = static_cast<int>(threadIdx.x); i < kN; i += static_cast<int>(blockDim.x)) {
      const int which = i / (kN / 2), n = i % (kN / 2) * 2;
      const float* from = (which ? m.w.C_bias : m.w.B_bias) + h * kN + n;
      of[which][n / 2] = __floats2half2_rn(from[0], from[1]);
    }
  }
};

// What a lane needs to find angles of the 16 rows from `row` of a chunk, on its way from memory:
// the loads are asked for well before their use, and stay where they stand.
template <int kS>
struct AngleSteps {
  static constexpr int kEach = (kS + kWarp - 1) / kWarp;  // lane + 32 e
  float before[kEach == 0 ? 1 : kEach];
  float step[kEach == 0 ? 1 : kEach][kAngleTokens];

  __device__ void load(const MixerTiles& g, int64_t chunk, int h, int row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane >= kS) return;
    const float* angle =
        g.angle + ((chunk * kAngles + row / kAngleTokens) * g.m.s.H + h) * kS + lane;
    const float* theta = g.m.theta + (chunk * kTileTokens + row) * kS + lane;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      before[e] = now(angle + e * kWarp);
#pragma unroll
      for (int t = 0; t < kAngleTokens; ++t) step[e][t] = now(theta + t * kS + e * kWarp);
    }
  }

 private:
  __device__ static float now(const float* from) {
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
  }
};

// cos and sin of the angles of a chunk in shared memory, as halves, which keep more than the bf16
// of a turned key: 32 angles in the place of 64 columns of a SharedTile, row for row.
template <int kS>
struct SharedRotary {
  static constexpr int kBytes = (kS + 31) / 32 * SharedTile<64>::kPanelBytes;
  uint32_t base;

  // i is a multiple of 4, and 0 <= more < 4. Permuted by row like a tile.
  __device__ uint32_t at(int row, int i, int more) const {
    const uint32_t start =
        base + static_cast<uint32_t>(row * SharedTile<64>::kRowBytes + (row & 7) * 16 + more * 4);
    return (start ^ static_cast<uint32_t>(i % 32 * 4)) +
           static_cast<uint32_t>(i / 32 * SharedTile<64>::kPanelBytes);
  }
  __device__ __half2 cos_sin(int row, int i, int more) const {
    uint32_t both;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(at(row, i, more)) : "memory");
    return *reinterpret_cast<const __half2*>(&both);
  }

  // The 16 rows from `row` of a chunk.
  __device__ void fill(const AngleSteps<kS>& steps, const ChunkTerms& terms, int row) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (lane >= kS) return;
    const uint32_t start = base + static_cast<uint32_t>(row * SharedTile<64>::kRowBytes);
#pragma unroll
    for (int e = 0; e < AngleSteps<kS>::kEach; ++e) {
      float phi = steps.before[e];
#pragma unroll
      for (int t = 0; t < kAngleTokens; ++t) {
        phi = fmaf(steps.step[e][t], terms.dt[row + t], phi);
        // The instructions count in turns and drop whole ones, so that a large angle loses no more
        // than its own rounding.
        const __half2 both = __floats2half2_rn(__cosf(phi), __sinf(phi));
        // at(row + t, lane + 32 e), where the row is a multiple of 8
        const uint32_t place =
            static_cast<uint32_t>(lane * 4) ^ static_cast<uint32_t>((t & 7) * 16);
        asm volatile(
            "st.shared.b32 [%0], %1;" ::"r"(start + place +
                                            static_cast<uint32_t>(t * SharedTile<64>::kRowBytes +
                                                                  e * SharedTile<64>::kPanelBytes)),
            "r"(*reinterpret_cast<const uint32_t*>(&both))
            : "memory");
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
template <bool kKeys, bool kQueries, int kN, int kS>
__device__ void turn(FragmentA* k, FragmentA* q, int column, const SharedBiases<kN>& biases,
                     const SharedRotary<kS>& rotary, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, r = row + lane / 4, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the 16 columns
    const int channel = channel_of<kN>(column), pair = channel / 2 + 4 * half;
#pragma unroll
    for (int low = 0; low < 2; ++low) {  // and of the 16 rows
      __half2 cos_sin{};
      if (channel < 2 * kS) cos_sin = rotary.cos_sin(r + 8 * low, pair, c);
      const auto one = [&](FragmentA& f, int which) {
        uint32_t& at = f.at[2 * half + low];
        __half2 x = __hadd2(*reinterpret_cast<const __half2*>(&at), biases.of[which][pair + c]);
        if (channel < 2 * kS) x = turned(x, cos_sin);
        at = as_bf16(x);
      };
      if constexpr (kKeys) one(*k, 0);
      if constexpr (kQueries) one(*q, 1);
    }
  }
}

// The part of a thread in copies of kTileTokens rows of kColumns 16-bit elements to a tile, which
// all kThreads threads of a block share. It points at its first piece in memory.
template <int kColumns, typename Element, int kThreads = kSpanThreads>
struct TileCopy {
  static_assert(sizeof(Element) == 2);
  static constexpr int kPieces = kColumns / 8, kStep = kThreads / kPieces;
  static_assert(kStep % 8 == 0, "so that the permutation of a thread's rows is the same");

  const Element* from;
  int64_t stride;

  __device__ static int row() { return static_cast<int>(threadIdx.x) / kPieces; }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % kPieces * 8; }
  __device__ TileCopy(const Element* first_row, int64_t row_stride)
      : from(first_row + row() * row_stride + column()), stride(row_stride) {}

  // Rows from `present` on become zeros.
  __device__ void operator()(const SharedTile<kColumns>& to, int present = kTileTokens) const {
    const uint32_t target = to.at(row(), column());
    const Element* source = from;
#pragma unroll
    for (int i = 0; i < kTileTokens / kStep; ++i) {
      // Of an absent token not even the address is used.
      copy_async(target + static_cast<uint32_t>(i * kStep * SharedTile<kColumns>::kRowBytes),
                 source, row() + i * kStep < present ? 16 : 0);
      source += kStep * stride;
    }
  }
  __device__ void move(int chunks) {
    from += chunks * (kTileTokens * stride);
  }
};

__device__ inline void copy_terms(ChunkTerms& to, const ChunkTerms* from) {
  const uint32_t piece = threadIdx.x * 16;
  if (piece < sizeof(ChunkTerms)) {
    copy_async(shared_address(&to) + piece, reinterpret_cast<const char*>(from) + piece, 16);
  }
}

// The state of a head's block in fragments: a warp has 16 of its 64 rows (p) and all N columns.
template <int kN>
struct StateFragments {
  int row0;  // of the warp
  FragmentC tile[kN / 8];

  __device__ int row() const {  // and 8 more
    return row0 + static_cast<int>(threadIdx.x) % kWarp / 4;
  }
  __device__ static int channel(int i) {
    return channel_of<kN>(8 * i) + static_cast<int>(threadIdx.x) % 4 * 2;
  }

  // f(value, p, n) for every element.
  template <typename Function>
  __device__ void for_each(const Function& f) {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(tile[i].at[j], row() + j / 2 * 8, channel(i) + j % 2);
    }
  }
  __device__ void scale(float factor) {
    for_each([&](float& value, int, int) { value *= factor; });
  }
  // Adds sum_t weight_t v_t k_t^T over the rows t of a chunk.
  __device__ void add(const SharedTile<kTileChannels>& v, const SharedTile<kN>& k,
                      const float (&weight)[kTileTokens]) {
    const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int t = 0; t < kTileTokens; t += 16) {
      FragmentA a = v.a_transposed(t, row0);
      const float2 low = *reinterpret_cast<const float2*>(&weight[t + 2 * c]);
      const float2 high = *reinterpret_cast<const float2*>(&weight[t + 2 * c + 8]);
      a.at[0] = multiply_bf16(a.at[0], low.x, low.y);
      a.at[1] = multiply_bf16(a.at[1], low.x, low.y);
      a.at[2] = multiply_bf16(a.at[2], high.x, high.y);
      a.at[3] = multiply_bf16(a.at[3], high.x, high.y);
#pragma unroll
      for (int n = 0; n < kN; n += 16) {
        const auto b = k.b(t, n);
        mma(tile[n / 8], a, b.left);
        mma(tile[n / 8 + 1], a, b.right);
      }
    }
  }
  // Rounded, as rows p of a tile. A warp writes its own 16 rows.
  __device__ void store(const SharedTile<kN>& to) const {
#pragma unroll
    for (int i = 0; i < kN / 8; ++i) {
      to.store_c(row0, 8 * i, tile[i]);
    }
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

// The state with which a walk over a span begins.
template <bool kReverse = false, int kN>
__device__ void begin_span(const MixerTiles& g, const MixerSpan& span, const HeadBlock& head,
                           const MixerStatePool& pool, StateFragments<kN>& state) {
  const MixerSegment& m = g.m;
  if (!span.alone) {
    const float* from = g.incoming + head.state_at(m, head.index);
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
      const float* k = pool.pool.k_prev + row * kN;
      state.for_each([&](float& value, int p, int n) { value = fmaf(carry * v[p], k[n], value); });
    }
  } else {
    state.for_each([](float& value, int, int) { value = 0; });
  }
}

inline constexpr float kLog2e = 1.44269504f;
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float fast_sigmoid(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1 + fast_exp2(x * -kLog2e)));
  return result;
}

// values *= silu(gates), each thread of a block its share.
__device__ inline void gate_rows(const SharedTile<kTileChannels>& values,
                                 const SharedTile<kTileChannels>& gates) {
  constexpr int kPieces = kTileChannels / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kTileTokens * kPieces;
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

// Calls body.template operator()<kN, kS>() for the state sizes and angles that have kernels.
template <typename Body>
void visit_tiles(const MixerShape& s, Body&& body) {
  const auto visit_angles = [&]<int kN>() {
    if (s.S == 0) return body.template operator()<kN, 0>();
    if (s.S == kN / 4) return body.template operator()<kN, kN / 4>();
    return body.template operator()<kN, kN / 2>();
  };
  return s.N == 64 ? visit_angles.template operator()<64>()
                   : visit_angles.template operator()<128>();
}

MixerStatePool state_pool(const MixerState& state);

// mixer_scan() of what mixer_scan_has_tiles(); mixer_scan_backward() of that without out_norm and
// states.
void mixer_scan_tiles(Context& ctx, const MixerScanArgs& args);
void mixer_scan_backward_tiles(Context& ctx, const MixerScanBackwardArgs& args);
// Whether a block of the card has the shared memory: with S = N/2 = 64 it takes 105 KiB.
bool mixer_scan_backward_fits_tiles(const Stream& stream, const MixerShape& shape);

// Scratch for segments of up to `count` chunks, whose spans have up to `length`.
MixerTiles take_tiles(const MixerShape& shape, const MixerParams& params, const MixerChunks& chunks,
                      int64_t count, int64_t length, ScratchScope& scope);
// Sets it to chunks from `first` on, `count` at most, and computes their terms, angles and spans.
// The angles of a sequence begin and end as in segment_states().
void fill_tiles(Context& ctx, const char* op, MixerTiles& tiles, const MixerChunks& chunks,
                int64_t first, int64_t count, int64_t length, const View& proj,
                const MixerState& pool, const MixerCarry& in, const MixerCarry& out, bool finish);

// The states before all chunks, in the order of the walk, to `states` (count, H, P, N): forward the
// state that x and B make; in reverse (with d_y) its gradient after a chunk. The state begins from
// `pool` or, where the segment begins inside a sequence, from `in`, and goes to `out` if the
// sequence goes on. A null `states`: only what comes in to each span is found.
struct SpanStates {
  const View& proj;
  const View* d_y = nullptr;
  const MixerState& pool;
  MixerCarry in, out;
  bf16* states = nullptr;
};
void span_states(Context& ctx, const char* op, const MixerTiles& tiles, const MixerChunks& chunks,
                 const SpanStates& args);
// Turns values (count, size) of chunks into the sums of those of later chunks of a sequence, with
// `in` (size) where it goes on after the segment; `out` if it began before.
void sum_later_chunks(Context& ctx, const char* op, const MixerTiles& tiles,
                      const MixerChunks& chunks, float* values, int64_t size, const float* in,
                      float* out);

}  // namespace mamba3::cuda
