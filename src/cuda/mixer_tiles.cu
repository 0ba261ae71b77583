// What comes before the passes over spans, and the pass that finds states; see mixer_tiles.cuh.

#include <algorithm>

#include "cuda/mixer_tiles.cuh"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr double kTurn = 6.283185307179586;

__device__ double reduced(double angle) {
  return fma(-kTurn, floor(angle * (1 / kTurn)), angle);
}

// Of the chunks [begin, end) of a sequence, of which only the last one may not be full.
__device__ int rows_of(const MixerSegment& m, int begin, int end) {
  return (end - 1 - begin) * kTileRows + m.chunks[end - 1].tokens * static_cast<int>(m.s.R);
}

// offsets[i + 1] = spans of the sequences up to i, then the list of spans.
__global__ void list_spans(MixerSegment m, int length, int segment, int32_t* offsets,
                           MixerSpan* spans) {
  const int thread = static_cast<int>(threadIdx.x);
  const int range = (m.sequences + kListThreads - 1) / kListThreads;
  const int first = min(m.sequences, thread * range), last = min(m.sequences, first + range);
  const auto for_spans = [&](int sequence, const auto& f) {
    const int last_end = m.offsets[sequence + 1];
    for (int begin = m.offsets[sequence]; begin < last_end;) {
      const int end = min(begin + min(length, segment - begin % segment), last_end);
      f(begin, end);
      begin = end;
    }
  };
  int mine = 0;
  for (int i = first; i < last; ++i) for_spans(i, [&](int, int) { ++mine; });
  int at = sum_of_earlier_threads(mine);
  if (thread == 0) offsets[0] = 0;
  for (int i = first; i < last; ++i) {
    for_spans(i, [&](int begin, int end) {
      spans[at++] = {begin, end, rows_of(m, begin, end),
                     m.chunks[begin].first && m.chunks[end - 1].last};
    });
    offsets[i + 1] = at;
  }
}

// The same where every sequence has `per_sequence` chunks, and no segment ends within one.
__global__ void list_even_spans(MixerSegment m, int per_sequence, int length, int32_t* offsets,
                                MixerSpan* spans) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int each = (per_sequence + length - 1) / length;
  if (i <= m.sequences) offsets[i] = i * each;
  const int sequence = i / each, first = i % each * length;
  if (sequence >= m.sequences) return;
  const int begin = sequence * per_sequence + first;
  const int end = begin + min(length, per_sequence - first);
  spans[i] = {begin, end, rows_of(m, begin, end), each == 1};
}

// The rows i, (B or C, r, g), of some tokens of a chunk after their norms: a warp a row of N.
constexpr int kNormTokens = kThreads / kWarp;
template <int kN, int kR>
__device__ void norm_rows(const MixerTiles& g, const MixerRows<const bf16>& proj, int c, int first,
                          int i) {
  constexpr int kEach = kN / kWarp;
  const MixerSegment& m = g.m;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, G = static_cast<int>(m.s.G);
  const int t = first + static_cast<int>(threadIdx.x) / kWarp;
  const int which = i / (kR * G), r = i / G % kR;
  const int64_t row = ((int64_t{c} * kTileRows + t * kR + r) * 2 + which) * G + i % G;
  const MixerChunk chunk = m.chunks[c];
  float x[kEach] = {};
  if (t < chunk.tokens) {
    load_places<kR>(proj.at(chunk, t) + m.s.B() + i * kN, x);
    float sum = 0;
#pragma unroll
    for (const float value : x) sum = fmaf(value, value, sum);
    const float rstd = rsqrtf(warp_sum(sum) / kN + m.s.eps);
    if (lane == 0) m.rstd[row] = rstd;
    float weight[kEach];
    load_places<kR>(which ? m.w.C_norm : m.w.B_norm, weight);
#pragma unroll
    for (int j = 0; j < kEach; ++j) x[j] *= rstd * weight[j];
  }
  store(x, g.normed + row * kN + column_of<kN>(lane * kEach));
}

// log(1 + e^x), exact to about 1e-6 of itself, also where it is small.
__device__ float fast_softplus(float x) {
  if (x > 20) return x;
  const float e = fast_exp2(x * kLog2e);
  return e < 0.03f ? e * (1 - e * (0.5f - e * (1.0f / 3 - e * 0.25f))) : __logf(1 + e);
}
// tanh(x), exact to about 1e-7.
__device__ float fast_tanh(float x) {
  return fmaf(-2.0f, fast_sigmoid(-2 * x), 1.0f);
}

// The terms of a chunk for kTermHeads heads, theta, and what the tokens of each 16 rows add to the
// angles. Threads are (head, part of the chunk) and then (angle, head).
constexpr int kTermTokens = 8;
constexpr int term_heads(int64_t R) {
  return kThreads * kTermTokens / kTileRows * static_cast<int>(R);
}
template <int kR>
__device__ void chunk_terms(const MixerTiles& g, const MixerRows<const bf16>& proj, int c,
                            int head_block) {
  constexpr int kQ = kTileRows / kR, kTermHeads = term_heads(kR), kTermParts = kQ / kTermTokens;
  MAMBA3_DYNAMIC_SHARED(float, theta);  // (Q, S)
  __shared__ float sums[kTermParts][kTermHeads];
  __shared__ bf16 raw[3][kQ + 1][kTermHeads + 2];
  __shared__ float4 dt_of[kTermHeads][kQ / 4];
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int S = static_cast<int>(s.S), head0 = head_block * kTermHeads;
  const int heads = min(kTermHeads, static_cast<int>(s.H) - head0);
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0) return;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  // Neighbours have the parts of one head, which lie side by side in memory.
  const int part = thread % kTermParts, local = thread / kTermParts, first = part * kTermTokens;
  const bool mine = local < heads;
  const int h = head0 + (mine ? local : 0);
  ChunkTerms& to = *g.terms_of(c, h);

  // The columns of these heads, of one token more than the chunk has where there is one.
  const int known = chunk.tokens + (chunk.last ? 0 : 1);
  for (int t = thread / kTermHeads; t <= kQ; t += threads / kTermHeads) {
    const bf16* row = proj.at(chunk, min(t, known - 1));
    const int own = thread % kTermHeads, from = head0 + min(own, heads - 1);
    raw[0][t][own] = row[s.dd_dt() + from];
    raw[1][t][own] = row[s.trap() + from];
    raw[2][t][own] = row[s.dd_A() + from];
  }
  for (int t = thread / kWarp; t < kQ; t += threads / kWarp) {
    const bf16* angle = proj.at(chunk, min(t, chunk.tokens - 1)) + s.angle();
    for (int i = thread % kWarp; i < S; i += kWarp) {
      const float value = t < chunk.tokens ? kPi * fast_tanh(to_float(angle[i])) : 0.0f;
      theta[t * S + i] = value;
      if (head_block == 0) m.theta[(int64_t{c} * kQ + t) * S + i] = value;
    }
  }

  __syncthreads();
  float log_decay[kTermTokens], scale[kTermTokens], gamma[kTermTokens], dt[kTermTokens];
  const float bias = m.w.dt_bias[h];
  float sum = 0, next_dt = fast_softplus(to_float(raw[0][first][local]) + bias);
  float next_lam = fast_sigmoid(to_float(raw[1][first][local]));
#pragma unroll
  for (int i = 0; i < kTermTokens; ++i) {
    const int t = first + i;
    const bool present = t < chunk.tokens;
    dt[i] = present ? next_dt : 0.0f;
    gamma[i] = next_lam * dt[i];
    sum -= fmaxf(decay_act(s.decay_act, to_float(raw[2][t][local])), s.A_floor) * dt[i];
    log_decay[i] = sum * kLog2e;
    next_dt = fast_softplus(to_float(raw[0][t + 1][local]) + bias);
    next_lam = fast_sigmoid(to_float(raw[1][t + 1][local]));
    scale[i] = present && t + 1 < known ? fmaf(1 - next_lam, next_dt, gamma[i]) : gamma[i];
  }
  dt_of[local][first / 4] = make_float4(dt[0], dt[1], dt[2], dt[3]);
  dt_of[local][first / 4 + 1] = make_float4(dt[4], dt[5], dt[6], dt[7]);
  sums[part][local] = sum * kLog2e;
  __syncthreads();

  float before = 0, end = 0;
  for (int i = 0; i < kTermParts; ++i) {
    if (i < part) before += sums[i][local];
    end += sums[i][local];
  }
  if (mine) {
    float from_start[kTermTokens], to_end[kTermTokens];
#pragma unroll
    for (int i = 0; i < kTermTokens; ++i) {
      log_decay[i] += before;
      from_start[i] = fast_exp2(log_decay[i]);
      to_end[i] = fast_exp2(fminf(end - log_decay[i], 0.0f)) * scale[i];
    }
    const auto write = [&](const float(&from)[kTermTokens], float* array) {
#pragma unroll
      for (int i = 0; i < kTermTokens * kR; i += 4) {
        *reinterpret_cast<float4*>(array + first * kR + i) =
            make_float4(from[i / kR], from[(i + 1) / kR], from[(i + 2) / kR], from[(i + 3) / kR]);
      }
    };
    write(log_decay, to.c);
    write(scale, to.scale);
    write(gamma, to.gamma);
    write(dt, to.dt);
    write(from_start, to.from_start);
    write(to_end, to.to_end);
  }

  // A warp has the tokens of 16 rows and takes some of the heads; a lane has an angle.
  constexpr int kSteps = kQ / kAngles, kPack = kSteps < 4 ? kSteps : 4;
  const int lane = thread % kWarp, warp = thread / kWarp, j = warp % kAngles;
  for (int i = lane; i < S; i += kWarp) {
    float step[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) step[t] = theta[(j * kSteps + t) * S + i];
    float* angle = g.angle + ((int64_t{c} * kAngles + j) * s.H + head0) * S + i;
    for (int k = warp / kAngles; k < heads; k += threads / kWarp / kAngles) {
      float turned = 0;
#pragma unroll
      for (int t = 0; t < kSteps; t += kPack) {
        float some[kPack];
        load(reinterpret_cast<const float*>(dt_of[k]) + j * kSteps + t, some);
#pragma unroll
        for (int e = 0; e < kPack; ++e) turned = fmaf(step[t + e], some[e], turned);
      }
      angle[k * S] = turned;
    }
  }
}

// Both: blockIdx.x is the chunk, blockIdx.y the heads of the terms, then tokens and rows of the
// norms. In one kernel, so that one hides what the other waits for.
template <int kN, int kR>
__global__ void __launch_bounds__(kThreads)
    prepare_chunks(MixerTiles g, MixerRows<const bf16> proj, int head_blocks) {
  const int c = static_cast<int>(blockIdx.x), i = static_cast<int>(blockIdx.y) - head_blocks;
  if (i < 0) return chunk_terms<kR>(g, proj, c, i + head_blocks);
  constexpr int kParts = kTileRows / kR / kNormTokens;
  norm_rows<kN, kR>(g, proj, c, i % kParts * kNormTokens, i / kParts);
}

// Turns values (steps, size) into the sums of those before, or with kBack of those after, in a
// sequence, `per_chunk` steps a chunk. Forward they are angles, modulo 2 pi. threads.x has columns,
// threads.y parts of a sequence; blockIdx.y takes every gridDim.y-th sequence of the segment.
constexpr int kWalkColumns = 32, kMostParts = 32;
template <bool kBack>
__global__ void __launch_bounds__(kWalkColumns* kMostParts)
    walk_sums(MixerSegment m, float* values, int per_chunk, int64_t size, const float* pool,
              const int32_t* rows, float* pool_out, const float* in, float* out) {
  __shared__ double sums[kMostParts][kWalkColumns];
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int64_t column = int64_t{blockIdx.x} * kWalkColumns + x;
  const bool mine = column < size;
  m.for_sequences([&](int sequence, int begin, int end, bool starts, bool ends) {
    const int64_t in_pool = (rows ? rows[sequence] : sequence) * size + column;
    const int parts = static_cast<int>(blockDim.y);
    const int count = (end - begin) * per_chunk, part = (count + parts - 1) / parts;
    const int first = min(count, y * part), last = min(count, first + part);
    float* at = values + int64_t{begin} * per_chunk * size + column;
    int64_t step = size;
    if (kBack) at += (count - 1) * size, step = -size;
    double sum = 0;
#pragma unroll 8
    for (int i = first; i < last; ++i) sum += mine ? static_cast<double>(at[i * step]) : 0.0;
    // Before the barrier, since the last part may write to where the pool is read.
    double before = 0;
    if (mine && (kBack ? !ends : !starts)) {
      before = static_cast<double>(in[column]);
    } else if (mine && pool) {
      before = static_cast<double>(pool[in_pool]);
    }
    __syncthreads();  // the sums of the last sequence have been read
    sums[y][x] = sum;
    __syncthreads();
    if (!mine) return;
    for (int i = 0; i < y; ++i) before += sums[i][x];
    if (!kBack) before = reduced(before);
#pragma unroll 4
    for (int i = first; i < last; ++i) {
      const double next = before + static_cast<double>(at[i * step]);
      at[i * step] = static_cast<float>(before);
      before = kBack ? next : reduced(next);
    }
    if (y + 1 < parts) return;
    if (kBack ? !starts : !ends) {
      out[column] = static_cast<float>(before);
    } else if (pool_out) {
      pool_out[in_pool] = static_cast<float>(before);
    }
  });
}

// Shared memory of span_walk. MIMO has values of one chunk, and for two what they are made from;
// its rotary tables are not in the place of the next keys, as those of SISO, because there a warp's
// tokens are not its rows, where it puts the state.
template <int kN, int kS, int kR, bool kReverse>
struct StatesShared {
  static constexpr int kInputs = kTileRows / kR * kTileChannels;
  bf16 keys[2][kTileRows * kN];
  bf16 values[kR == 1 ? 2 : 1][kTileRows * kTileChannels];
  bf16 inputs[2][kR == 1 ? 64 : kInputs];
  bf16 gates[2][kReverse ? kInputs : 64];
  char rotary[kR == 1 ? 128 : SharedRotary<kS, kR>::kBytes];
  ChunkTerms terms[2];
  SharedBiases<kN, kR> biases;
};

// Walks the chunks of a span, forward with the state that keys and values make, or in reverse with
// its gradient, which queries and d_y make in the same way. Of spans that begin in the `count`
// chunks from `first` on it writes the state before each chunk (in the order of the walk) to
// `states`; where that is null, it finds what every span adds, in `incoming`.
template <int kN, int kS, int kR, bool kReverse>
__device__ void walk_span(const MixerTiles& g, const MixerRows<const bf16>& proj,
                          const MixerRows<const bf16>& d_y, const MixerStatePool& pool, int first,
                          int count, bf16* states) {
  MAMBA3_DYNAMIC_SHARED(__align__(1024) char, memory);
  auto& shared = *reinterpret_cast<StatesShared<kN, kS, kR, kReverse>*>(memory);
  const MixerSegment& m = g.m;
  const HeadBlock head(g);
  if (head.index >= g.span_offsets[m.sequences]) return;
  const MixerSpan span = g.spans[head.index];
  if (states && (span.begin < first || span.begin >= first + count)) return;
  const int length = span.end - span.begin, last = kReverse ? span.begin : span.end - 1;
  const int h = head.h, group = h / static_cast<int>(m.s.H / m.s.G);
  const int thread = static_cast<int>(threadIdx.x), row = thread / kWarp * 16;  // of this warp
  // Nobody asks for what the last span of a sequence adds.
  if (!states && (kReverse ? m.chunks[last].first : m.chunks[last].last)) return;

  const int64_t channel = h * m.s.P + head.block * kTileChannels;
  // The first chunk of the walk.
  const int number0 = kReverse ? length - 1 : 0, step = kReverse ? -1 : 1;
  constexpr int kQ = kTileRows / kR;
  int present = (span.rows - number0 * kTileRows) / kR;  // tokens
  TileCopy<kN, __half> copy_keys(g.normed_of(span.begin + number0, kReverse ? 1 : 0, group),
                                 g.normed_stride());
  const bf16* token = proj.at(m.chunks[span.begin + number0], 0) + channel;
  using CopyTokens = TileCopy<kTileChannels, const bf16, kSpanThreads, kQ>;
  CopyTokens copy_x(token + (kReverse ? m.s.z() : m.s.x()), proj.token_stride);
  CopyTokens copy_d(d_y.at(m.chunks[span.begin + number0], 0) + channel, d_y.token_stride);
  const ChunkTerms* terms_from = g.terms_of(span.begin + number0, h);
  const auto inputs_of = [&](int buffer) {
    bf16* const tile = kR == 1 ? shared.values[kR == 1 ? buffer : 0] : shared.inputs[buffer];
    return SharedTile<kTileChannels>{shared_address(tile)};
  };
  const auto prefetch = [&](int buffer) {
    copy_keys(SharedTile<kN>{shared_address(shared.keys[buffer])});
    const SharedTile<kTileChannels> inputs = inputs_of(buffer);
    if constexpr (kReverse) {
      copy_d(inputs, present);
      copy_x(SharedTile<kTileChannels>{shared_address(shared.gates[buffer])}, present);
    } else {
      copy_x(inputs, present);
    }
    copy_terms(shared.terms[buffer], terms_from);
    commit_copies();
    copy_keys.move(step);
    copy_x.move(step);
    if (kReverse) copy_d.move(step);
    terms_from += step * m.s.H;
    present -= step * kQ;
  };

  prefetch(0);
  shared.biases.fill(m, h);
  StateFragments<kN, kR> state{.row0 = row, .tile = {}};
  if (states) begin_span<kReverse>(g, span, head, pool, state);

  AngleSteps<kS, kR> steps;
  steps.load(g, span.begin + number0, h, row);
  float decay = 1;
  for (int i = 0; i < length; ++i) {
    const int c = span.begin + number0 + step * i, buffer = i % 2;
    const SharedTile<kN> keys{shared_address(shared.keys[buffer])};
    const SharedTile<kN> idle{shared_address(shared.keys[buffer ^ 1])};
    const SharedTile<kTileChannels> values{shared_address(shared.values[kR == 1 ? buffer : 0])};
    const ChunkTerms& terms = shared.terms[buffer];
    const SharedRotary<kS, kR> rotary{kR == 1 ? idle.base : shared_address(shared.rotary)};
    wait_copies<0>();
    __syncthreads();

    rotary.fill(steps, terms, row);
    __syncwarp();
    FragmentA f[kN / 16];
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      f[j] = keys.a(row, 16 * j);
      turn<!kReverse, kReverse>(&f[j], &f[j], 16 * j, shared.biases, rotary, row);
    }
    __syncwarp();  // lanes have read each other's places
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) keys.store_a(row, 16 * j, f[j]);
    __syncwarp();
    if (states) {
      state.store(idle);
      __syncwarp();
      // 16 bytes of a row for each lane.
      bf16* to = states + head.state_at(m, c - first);
      const int lane = thread % kWarp;
#pragma unroll
      for (int j = lane; j < 16 * (kN / 8); j += kWarp) {
        const int p = row + j / (kN / 8), n = j % (kN / 8) * 8;
        *reinterpret_cast<uint4*>(to + p * kN + n) = idle.load8(p, n);
      }
    }
    const SharedTile<kTileChannels> gates{shared_address(shared.gates[buffer])};
    if constexpr (kR == 1) {
      if constexpr (kReverse) gate_rows(values, gates);
    } else if constexpr (kReverse) {
      expand_gradients<kR>(values, inputs_of(buffer), gates, rank_of(m.w.mimo_o, m.s, head),
                           rank_of(m.w.mimo_z, m.s, head), m.s.P, row);
    } else {
      expand_values<kR>(values, inputs_of(buffer), rank_of(m.w.mimo_x, m.s, head), m.s.P, row);
    }
    publish_tiles();
    __syncthreads();
    if (i + 1 < length) {
      prefetch(buffer ^ 1);
      steps.load(g, c + step, h, row);
    }

    const float left = terms.from_start[kTileRows - 1];
    decay *= left;
    state.scale(left);
    state.add(values, keys, kReverse ? terms.from_start : terms.to_end);
    state.finish();
  }

  if (kReverse && states && g.d_initial && m.chunks[last].first) {
    float* to = g.d_initial + head.state_at(m, m.chunks[last].sequence);
    state.for_each([&](float& value, int p, int n) { to[p * kN + n] = value; });
  }
  if (!states) {
    float* to = (kReverse ? g.d_incoming : g.incoming) + head.state_at(m, head.index);
    state.for_each([&](float& value, int p, int n) { to[p * kN + n] = value; });
    if (thread == 0 && head.block == 0) {
      (kReverse ? g.d_span_decay : g.span_decay)[int64_t{head.index} * m.s.H + h] = decay;
    }
  }
}

template <int kN, int kS, int kR>
__global__ void __launch_bounds__(kSpanThreads, kSpanBlocks)
    forward_sums(MixerTiles g, MixerRows<const bf16> proj, MixerStatePool pool) {
  walk_span<kN, kS, kR, false>(g, proj, proj, pool, 0, 0, nullptr);
}

// Both ways, blockIdx.y says which: side by side, so that few heads fill more of the GPU.
template <int kN, int kS, int kR>
__global__ void __launch_bounds__(kSpanThreads, kSpanBlocks)
    both_walks(MixerTiles g, MixerRows<const bf16> proj, MixerRows<const bf16> d_y,
               MixerStatePool pool, MixerStatePool d_final, int first, int count, bf16* states,
               bf16* d_states) {
  if (blockIdx.y == 0) {
    walk_span<kN, kS, kR, false>(g, proj, d_y, pool, first, count, states);
  } else {
    walk_span<kN, kS, kR, true>(g, proj, d_y, d_final, first, count, d_states);
  }
}

// Turns what each span adds into the state that comes in to it. A thread for (p, n); blockIdx.z is
// the head.
template <bool kReverse>
__global__ void walk_spans(MixerTiles g, MixerStatePool pool) {
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int N = static_cast<int>(s.N), h = static_cast<int>(blockIdx.z);
  const int element = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);  // of P N
  if (element >= static_cast<int>(s.P) * N) return;
  const int64_t size = s.H * s.P * s.N, index = h * s.P * s.N + element;
  const int p = element / N, n = element % N;
  m.for_sequences([&](int sequence, int begin, int, bool, bool) {
    const int first = g.span_offsets[sequence], spans = g.span_offsets[sequence + 1] - first;
    if (spans == 1) return;
    float state = 0;
    if (!pool.empty()) {
      const int64_t row = pool.pool.rows[sequence];
      state = pool.ssm(row * size + index);
      if (!kReverse) {
        const ChunkTerms& terms = *g.terms_of(begin, h);
        const float v =
            (terms.dt[0] - terms.gamma[0]) * pool.pool.v_prev[(row * s.H + h) * s.P + p];
        for (int r = 0; r < static_cast<int>(s.R); ++r) {
          const float up = s.mimo ? m.w.mimo_x[(h * s.R + r) * s.P + p] : 1;
          const int64_t k = k_prev_row(s, row * s.H + h, r) * s.N + n;
          state = fmaf(v * up, pool.pool.k_prev[k], state);
        }
      }
    }
    for (int i = 0; i < spans; ++i) {
      const int64_t span = kReverse ? first + spans - 1 - i : first + i;
      float& at = (kReverse ? g.d_incoming : g.incoming)[span * size + index];
      const bool needed = i + 1 < spans;  // else nothing was written there
      const float added = needed ? at : 0.0f;
      at = state;
      const float* decay = kReverse ? g.d_span_decay : g.span_decay;
      if (needed) state = fmaf(decay[span * s.H + h], state, added);
    }
  });
}

// Of walk_sums: as many parts of a sequence as have a few steps each.
Grid walk_grid(const MixerSegment& m, const MixerChunks& chunks, int64_t per_chunk, int64_t size) {
  const int64_t longest = chunks.per_sequence > 0 ? chunks.per_sequence : m.count;
  unsigned parts = 1;
  while (parts < kMostParts && parts * 8 < longest * per_chunk) parts *= 2;
  return {.blocks = {blocks_for(size, kWalkColumns), walks_of(m, chunks)},
          .threads = {kWalkColumns, parts}};
}

// Whether every sequence has as many spans, and no segment cuts one.
bool has_even_spans(const MixerChunks& chunks, int64_t segment) {
  return chunks.per_sequence > 0 && (segment >= chunks.count || segment % chunks.per_sequence == 0);
}

unsigned span_blocks(const MixerTiles& g) {
  return static_cast<unsigned>(g.span_count * g.m.s.H * g.blocks);
}

void launch_both_walks(Context& ctx, const char* op, const MixerTiles& g, const View& proj,
                       const View& d_y, const MixerState& pool, const MixerState& d_final,
                       int first, int count, bf16* states, bf16* d_states) {
  visit_tiles(g.m.s, [&]<int kN, int kS, int kR>() {
    launch(ctx, op, both_walks<kN, kS, kR>,
           {.blocks = {span_blocks(g), 2},
            .threads = kSpanThreads,
            .shared_bytes = sizeof(StatesShared<kN, kS, kR, true>)},
           g, MixerRows<const bf16>(proj), MixerRows<const bf16>(d_y), state_pool(pool),
           state_pool(d_final), first, count, states, d_states);
  });
}

}  // namespace

MixerStatePool state_pool(const MixerState& state) {
  const bool is_bf16 = !state.empty() && state.ssm.dtype == DType::bf16;
  MixerStatePool pool{MixerPool<float>(state), is_bf16 ? data<bf16>(state.ssm) : nullptr};
  if (is_bf16) pool.pool.ssm = nullptr;
  return pool;
}

MixerTiles take_tiles(const MixerShape& s, const MixerParams& params, const MixerChunks& chunks,
                      int64_t length, int64_t segment, bool backward, ScratchScope& scope) {
  const int64_t count = chunks.count, states = s.H * s.P * s.N;
  // A sequence has at most one span that is not full, and so has a segment.
  const int64_t spans =
      has_even_spans(chunks, segment)
          ? chunks.sequences * ((chunks.per_sequence + length - 1) / length)
          : std::min(count, count / length + std::min(chunks.sequences, count) + count / segment);
  const auto take = [&](int64_t n) { return scope.take<float>(n).data(); };
  MixerTiles g{.m = empty_segment(s, params, chunks, kTileRows / s.R),
               .blocks = static_cast<int>(s.P / kTileChannels),
               .terms = scope.take<ChunkTerms>(count * s.H).data(),
               .normed = scope.take<__half>(count * kTileRows * 2 * s.G * s.N).data(),
               .angle = take(count * kAngles * s.H * s.S),
               .spans = scope.take<MixerSpan>(spans).data(),
               .span_offsets = scope.take<int32_t>(chunks.sequences + 1).data(),
               .span_count = static_cast<int>(spans),
               .incoming = take(spans * states),
               .span_decay = take(spans * s.H),
               .d_incoming = backward ? take(spans * states) : nullptr,
               .d_span_decay = backward ? take(spans * s.H) : nullptr};
  move_segment(g.m, chunks, 0, count);
  g.m.theta = take(count * g.m.Q * s.S);
  g.m.rstd = take(count * kTileRows * 2 * s.G);
  return g;
}

void fill_tiles(Context& ctx, const char* op, const MixerTiles& g, const MixerChunks& chunks,
                int64_t length, int64_t segment, const View& proj, const MixerState& pool,
                bool finish) {
  const MixerSegment& m = g.m;
  const MixerRows<const bf16> rows(proj);
  const unsigned head_blocks = blocks_for(m.s.H, term_heads(m.s.R));
  const auto norm_blocks = static_cast<unsigned>(2 * m.s.G * kTileRows / kNormTokens);
  visit_ranks(m.s, [&]<int kN, int kR>() {
    launch(ctx, op, prepare_chunks<kN, kR>,
           {.blocks = {static_cast<unsigned>(m.count), head_blocks + norm_blocks},
            .threads = kThreads,
            .shared_bytes = static_cast<size_t>(m.Q * m.s.S) * sizeof(float)},
           g, rows, head_blocks);
  });
  if (has_even_spans(chunks, segment)) {
    const int64_t items = std::max<int64_t>(g.span_count, chunks.sequences + 1);
    launch(ctx, op, list_even_spans, {.blocks = blocks_for(items, kThreads), .threads = kThreads},
           m, chunks.per_sequence, length, g.span_offsets, g.spans);
  } else {
    launch(ctx, op, list_spans, {.blocks = 1, .threads = kListThreads}, m, length, segment,
           g.span_offsets, g.spans);
  }
  if (m.s.S == 0) return;
  float* angle = pool.empty() ? nullptr : data<float>(pool.angle);
  launch(ctx, op, walk_sums<false>, walk_grid(m, chunks, kAngles, m.s.H * m.s.S), m, g.angle,
         kAngles, m.s.H * m.s.S, angle, data<int32_t>(pool.rows), finish ? angle : nullptr, nullptr,
         nullptr);
}

void find_incoming(Context& ctx, const char* op, const MixerTiles& g, const MixerChunks& chunks,
                   const View& proj, const View* d_y, const MixerState& state,
                   const MixerState& d_final) {
  if (chunks.per_sequence > 0 && g.span_count == chunks.sequences) return;  // they are sequences
  const MixerShape& s = g.m.s;
  const MixerRows<const bf16> rows(proj);
  const MixerStatePool pool = state_pool(state);
  const auto walk = [&](auto kernel, const MixerStatePool& from) {
    launch(ctx, op, kernel,
           {.blocks = {blocks_for(s.P * s.N, kThreads), walks_of(g.m, chunks),
                       static_cast<unsigned>(s.H)},
            .threads = kThreads},
           g, from);
  };
  if (d_y) {
    launch_both_walks(ctx, op, g, proj, *d_y, state, d_final, 0, g.m.count, nullptr, nullptr);
    walk(walk_spans<true>, state_pool(d_final));
  } else {
    visit_tiles(s, [&]<int kN, int kS, int kR>() {
      launch(ctx, op, forward_sums<kN, kS, kR>,
             {.blocks = span_blocks(g),
              .threads = kSpanThreads,
              .shared_bytes = sizeof(StatesShared<kN, kS, kR, false>)},
             g, rows, pool);
    });
  }
  walk(walk_spans<false>, pool);
}

MixerTiles part_of(const MixerTiles& tiles, const MixerChunks& chunks, int64_t first,
                   int64_t count) {
  const MixerShape& s = tiles.m.s;
  MixerTiles part = tiles;
  move_segment(part.m, chunks, first, count);
  part.m.theta += first * part.m.Q * s.S;
  part.m.rstd += first * kTileRows * 2 * s.G;
  part.terms += first * s.H;
  part.normed += first * kTileRows * 2 * s.G * s.N;
  part.angle += first * kAngles * s.H * s.S;
  return part;
}

void part_states(Context& ctx, const char* op, const MixerTiles& tiles, const MixerTiles& part,
                 const View& proj, const View& d_y, const MixerState& pool,
                 const MixerState& d_final, bf16* states, bf16* d_states) {
  launch_both_walks(ctx, op, tiles, proj, d_y, pool, d_final, part.m.first, part.m.count, states,
                    d_states);
}

void sum_later_chunks(Context& ctx, const char* op, const MixerTiles& g, const MixerChunks& chunks,
                      float* values, int64_t size, const float* in, float* out, float* ends) {
  launch(ctx, op, walk_sums<true>, walk_grid(g.m, chunks, 1, size), g.m, values, 1, size, ends,
         nullptr, ends, in, out);
}

}  // namespace mamba3::cuda
