// The schedule is in mixer_segment.cuh.

#include <algorithm>

#include "cuda/mixer_segment.cuh"
#include "cuda/tile_product.cuh"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTermHeads = 32, kTermTokens = 8;  // of a block of chunk_terms

// offsets[i + 1] = chunks of the sequences up to i.
__global__ void count_chunks(const int32_t* cu, int sequences, int Q, int32_t* offsets) {
  const auto chunks_of = [&](int i) { return (cu[i + 1] - cu[i] + Q - 1) / Q; };
  const int thread = static_cast<int>(threadIdx.x);
  const int range = (sequences + kListThreads - 1) / kListThreads;
  const int begin = min(sequences, thread * range), end = min(sequences, begin + range);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += chunks_of(i);
  int total = sum_of_earlier_threads(mine);
  if (thread == 0) offsets[0] = 0;
  for (int i = begin; i < end; ++i) {
    total += chunks_of(i);
    offsets[i + 1] = total;
  }
}

__global__ void fill_chunks(const int32_t* cu, int sequences, int Q, const int32_t* offsets,
                            int count, MixerChunk* chunks) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c >= count) return;
  if (c >= offsets[sequences]) {
    chunks[c] = {0, 0, 0, sequences, false, false};
    return;
  }
  int low = 0, high = sequences;  // offsets[low] <= c < offsets[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= c ? low : high) = middle;
  }
  const int i = c - offsets[low];
  const int tokens = cu[low + 1] - cu[low];
  chunks[c] = {0, cu[low] + i * Q, min(Q, tokens - i * Q), low, i == 0, tokens <= (i + 1) * Q};
}

// Both at once where every sequence has the same length.
__global__ void fill_even_chunks(int64_t T, int sequences, int per_sequence, int Q,
                                 int32_t* offsets, MixerChunk* chunks) {
  const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (c <= sequences) offsets[c] = c * per_sequence;
  const int sequence = c / per_sequence, i = c % per_sequence;
  if (sequence >= sequences) return;
  const int tokens = static_cast<int>(T);
  chunks[c] = {sequence, i * Q, min(Q, tokens - i * Q), sequence, i == 0, i + 1 == per_sequence};
}

// Block (c, t): rstd of the rows of B and C, and theta.
template <typename T>
__global__ void token_terms(MixerSegment m, MixerRows<const T> proj) {
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const MixerShape& s = m.s;
  const T* row = proj.at(chunk, t);
  const int rows = static_cast<int>(2 * s.R * s.G), N = static_cast<int>(s.N);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int i = thread / kWarp; i < rows; i += static_cast<int>(blockDim.x) / kWarp) {
    const T* raw = row + s.B() + i * N;  // C follows B
    float sum = 0;
    for (int n = lane; n < N; n += kWarp) sum = fmaf(to_float(raw[n]), to_float(raw[n]), sum);
    sum = warp_sum(sum);
    if (lane == 0) {
      m.rstd[int64_t{blockIdx.x} * rows + i] =
          s.bc_norm ? rsqrtf(sum / static_cast<float>(N) + s.eps) : 1.0f;
    }
  }
  for (int i = thread; i < s.S; i += static_cast<int>(blockDim.x)) {
    m.theta[int64_t{blockIdx.x} * s.S + i] = theta_of(s, row, i);
  }
}

// Block (c, heads): dt, gamma, scale, and the sums c of A dt with what depends on them.
template <typename T>
__global__ void chunk_terms(MixerSegment m, MixerRows<const T> proj) {
  MAMBA3_DYNAMIC_SHARED(float, A_dt);  // (Q, kTermHeads + 1)
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x), Q = m.Q, R = static_cast<int>(s.R);
  const int lane = static_cast<int>(threadIdx.x);
  const int h = static_cast<int>(blockIdx.y) * kTermHeads + lane;
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0) return;
  const bool mine = h < s.H;
  const int64_t at = m.at(c, h) * Q;
  const auto dt_of = [&](const T* row) {
    return softplus(to_float(row[s.dd_dt() + h]) + m.w.dt_bias[h]);
  };

  for (int t = static_cast<int>(threadIdx.y); mine && t < chunk.tokens; t += kTermTokens) {
    const T* row = proj.at(chunk, t);
    const float dt = dt_of(row), gamma = trapezoid(s, row, h) * dt;
    float scale = gamma;
    if (t + 1 < chunk.tokens || !chunk.last) {
      const T* next = proj.at(chunk, t + 1);
      scale += (1 - trapezoid(s, next, h)) * dt_of(next);
    }
    A_dt[t * (kTermHeads + 1) + lane] = -decay_rate(s, m.w, row, h) * dt;
    m.dt[at + t] = dt;
    m.gamma[at + t] = gamma;
    m.scale[at + t] = scale;
  }
  __syncthreads();
  if (mine && threadIdx.y == 0) {
    double sum = 0;
    for (int t = 0; t < chunk.tokens; ++t) {
      sum += static_cast<double>(A_dt[t * (kTermHeads + 1) + lane]);
      const float high = static_cast<float>(sum);
      m.c[at + t] = high;
      m.c_low[at + t] = static_cast<float>(sum - static_cast<double>(high));
    }
  }
  __syncthreads();
  const int last = chunk.tokens - 1;
  for (int t = static_cast<int>(threadIdx.y); mine && t < chunk.tokens; t += kTermTokens) {
    const float from_start = expf(m.c[at + t]);
    const float to_end =
        expf((m.c[at + last] - m.c[at + t]) + (m.c_low[at + last] - m.c_low[at + t])) *
        m.scale[at + t];
    for (int r = 0; r < R; ++r) {
      m.from_start[(at + t) * R + r] = from_start;
      m.to_end[(at + t) * R + r] = to_end;
    }
  }
}

// The angles of a chunk, counted from its start: a thread for (c, h, i).
__global__ void chunk_angles(MixerSegment m) {
  const int S = static_cast<int>(m.s.S), H = static_cast<int>(m.s.H);
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= int64_t{m.count} * H * S) return;
  const int i = static_cast<int>(index % S);
  const int64_t head = index / S;  // c H + h
  const int c = static_cast<int>(head / H), tokens = m.chunks[c].tokens;
  const float* theta = m.theta + int64_t{c} * m.Q * S + i;
  const float* dt = m.dt + head * m.Q;
  float* angle = m.angle + head * m.Q * S + i;
  // In double: with one rounding a chunk the angles of a long sequence stay within 1e-5.
  constexpr double kTurn = 6.283185307179586;
  double phi = 0;
  for (int t = 0; t < tokens; ++t) {
    const float step = angle_step(m.s, dt[t]);
    phi = fma(static_cast<double>(theta[int64_t{t} * S]), static_cast<double>(step), phi);
    phi = fma(-kTurn, floor(phi * (1 / kTurn)), phi);
    angle[int64_t{t} * S] = static_cast<float>(phi);
  }
}

// The angle before each chunk. A thread for (h, i).
__global__ void walk_angles(MixerSegment m, const float* pool, const int32_t* rows, float* pool_out,
                            const float* in, float* out) {
  const int S = static_cast<int>(m.s.S);
  const int64_t size = m.s.H * S;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int64_t h = index / S, i = index % S;
  m.for_sequences([&](int sequence, int begin, int end, bool starts, bool ends) {
    float phi = 0;
    if (!starts) {
      phi = in[index];
    } else if (pool) {
      phi = pool[rows[sequence] * size + index];
    }
    for (int c = begin; c < end; ++c) {
      m.start_angle[c * size + index] = phi;
      const int64_t last = (c * m.s.H + h) * m.Q + m.chunks[c].tokens - 1;
      phi = reduced_angle(phi + m.angle[last * S + i]);
    }
    if (!ends) {
      out[index] = phi;
    } else if (pool_out) {
      pool_out[rows[sequence] * size + index] = phi;
    }
  });
}

// Keys and queries of the token of blockIdx.x for all heads. A thread turns one pair of every rank.
template <typename T>
__global__ void keys_queries(MixerSegment m, MixerRows<const T> proj, bool with_q) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int H = static_cast<int>(s.H), N = static_cast<int>(s.N), S = static_cast<int>(s.S);
  const int R = static_cast<int>(s.R), G = static_cast<int>(s.G), parts = N - S;
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index >= H * parts) return;
  const int h = index / parts, i = index % parts, g = h / (H / G);
  const RotaryPart part = rotary_part(s, i);
  float cosine = 1, sine = 0;
  if (part.pair) {
    const float phi = m.start_angle[m.at(c, h) * S + i] + m.angle[(m.at(c, h) * m.Q + t) * S + i];
    sincosf(phi, &sine, &cosine);
  }
  const T* row = proj.at(chunk, t);
  const float* rstd = m.rstd + int64_t{blockIdx.x} * 2 * R * G;
  for (int r = 0; r < R; ++r) {
    const int rg = r * G + g;
    const int row_of_bias = (h * R + r) * N;
    const float* biases[] = {m.w.B_bias ? m.w.B_bias + row_of_bias : nullptr,
                             m.w.C_bias ? m.w.C_bias + row_of_bias : nullptr};
    const float* norms[] = {m.w.B_norm, m.w.C_norm};
    float* outs[] = {m.k, m.q};
#pragma unroll
    for (int is_q = 0; is_q < 2; ++is_q) {
      if (is_q && !with_q) break;
      const T* raw = row + (is_q ? s.C() : s.B()) + rg * N;
      const float rstd_r = rstd[is_q * R * G + rg];
      const auto value = [&](int n) {
        return key_channel(to_float(raw[n]), rstd_r, norms[is_q], biases[is_q], n);
      };
      float* out = outs[is_q] + (m.at(c, h) * m.M + t * R + r) * N;
      const float a = value(part.a);
      if (part.pair) {
        const float b = value(part.b);
        out[part.a] = a * cosine - b * sine;
        out[part.b] = a * sine + b * cosine;
      } else {
        out[part.a] = a;
      }
    }
  }
}

// v_r = x * mimo_x[h, r] of the token of blockIdx.x for all heads.
template <typename T>
__global__ void values(MixerSegment m, MixerRows<const T> proj) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index >= s.H * P) return;
  const int h = index / P, p = index % P;
  const float x = to_float(proj.at(chunk, t)[s.x() + index]);
  for (int r = 0; r < R; ++r) {
    const float up = m.w.mimo_x ? m.w.mimo_x[(h * R + r) * P + p] : 1.0f;
    m.v[(m.at(c, h) * m.M + t * R + r) * P + p] = x * up;
  }
}

// Block (c, h), tile of (P, N).
__global__ void __launch_bounds__(kTileThreads)
    outer_products(MixerSegment m, const float* a, const float* b, const float* scale, float* out) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), N = static_cast<int>(m.s.N);
  const int rows = m.chunks[block.c].tokens * static_cast<int>(m.s.R);
  if (rows == 0) return;
  const int64_t at = m.at(block.c, block.h);
  Tile tile(static_cast<int>(blockIdx.y), P, static_cast<int>(blockIdx.z), N);
  tile.multiply(shared, operand<true>(a + at * m.M * P, P, scale + at * m.M),
                operand(b + at * m.M * N, N), 0, rows);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) tile.store(out + at * P * N, i, tile.sum[i]);
}

// Turns what each chunk adds to the state into the state before it. A thread for (h, p, n).
template <typename S>
__global__ void walk_states(MixerSegment m, MixerPool<S> pool, bool finish, const float* in,
                            float* out) {
  const MixerShape& s = m.s;
  const int64_t size = s.H * s.P * s.N;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int h = static_cast<int>(index / (s.P * s.N));
  const int64_t p = index / s.N % s.P, n = index % s.N;
  m.for_sequences([&](int sequence, int begin, int end, bool starts, bool ends) {
    float state = 0;
    if (!starts) {
      state = in[index];
    } else if (pool.ssm) {
      // and what the first token adds for the last one of the call before
      const int64_t row = pool.rows[sequence];
      const int64_t at = m.at(begin, h) * m.Q;
      const float carry = m.dt[at] - m.gamma[at];
      const float v = carry * pool.v_prev[(row * s.H + h) * s.P + p];
      state = to_float(pool.ssm[row * size + index]);
      for (int r = 0; r < s.R; ++r) {
        const float up = m.w.mimo_x ? m.w.mimo_x[(h * s.R + r) * s.P + p] : 1.0f;
        state = fmaf(v * up, pool.k_prev[((row * s.R + r) * s.H + h) * s.N + n], state);
      }
    }
    float next = m.state[begin * size + index];
    for (int c = begin; c < end; ++c) {
      const float added = next;
      if (c + 1 < end) next = m.state[(c + 1) * size + index];
      m.state[c * size + index] = state;
      state = fmaf(m.decay(c, h), state, added);
    }
    if (!ends) {
      out[index] = state;
    } else if (finish && pool.ssm) {
      pool.ssm[pool.rows[sequence] * size + index] = from_float<S>(state);
    }
  });
}

// Block (c, h), tile of (M, M): W from q k^T. In a chunk that is not full, rows and columns of
// absent tokens are neither read nor written.
__global__ void __launch_bounds__(kTileThreads) chunk_weights(MixerSegment m) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int N = static_cast<int>(m.s.N), R = static_cast<int>(m.s.R), M = m.M;
  const int rows = m.chunks[block.c].tokens * R;
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), rows);
  if (tile.row0 >= rows || tile.col0 >= m.visible_end(tile.row0, rows)) return;
  const int64_t at = m.at(block.c, block.h);
  tile.multiply(shared, operand(m.q + at * M * N, N), operand<true>(m.k + at * M * N, N), 0, N);
  const float *c = m.c + at * m.Q, *c_low = m.c_low + at * m.Q;
  const float *gamma = m.gamma + at * m.Q, *scale = m.scale + at * m.Q;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int row = tile.row(i), t = row / R;
    if (row >= rows) break;
    float weights[Tile::kCols];
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      const int key = (tile.col() + j) / R;
      if (key > t) {
        weights[j] = 0;
      } else if (key == t) {
        weights[j] = tile.sum[i][j] * gamma[t];
      } else {
        const float decay = expf(fminf(0.0f, (c[t] - c[key]) + (c_low[t] - c_low[key])));
        weights[j] = tile.sum[i][j] * (decay * scale[key]);
      }
    }
    tile.store(m.weights + at * M * M, i, weights, M);
    if (m.scores) tile.store(m.scores + at * M * M, i, tile.sum[i], M);
  }
}

// Block (c, h), tile of (M, P): y_i = exp(c_t) S q_i + sum_j W_ij v_j + D v_i.
__global__ void __launch_bounds__(kTileThreads) chunk_outputs(MixerSegment m) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), N = static_cast<int>(m.s.N), M = m.M;
  const int rows = m.chunks[block.c].tokens * static_cast<int>(m.s.R);
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), P);
  if (tile.row0 >= rows) return;
  const int64_t at = m.at(block.c, block.h);
  tile.multiply(shared, operand(m.q + at * M * N, N), operand<true>(m.state + at * P * N, N), 0, N);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float decay = tile.row(i) < rows ? m.from_start[at * M + tile.row(i)] : 0.0f;
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) tile.sum[i][j] *= decay;
  }
  const float* v = m.v + at * M * P;
  tile.multiply(shared, operand(m.weights + at * M * M, M), operand(v, P), 0,
                m.visible_end(tile.row0, rows));
  const float D = m.w.D[block.h];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    if (tile.row(i) >= rows) break;
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      if (tile.col() + j < P) {
        const int64_t from = int64_t{tile.row(i)} * P + tile.col() + j;
        tile.sum[i][j] = fmaf(D, v[from], tile.sum[i][j]);
      }
    }
    tile.store(m.y + at * M * P, i, tile.sum[i]);
  }
}

dim3 by_tiles(const MixerSegment& m, int64_t rows, int64_t cols) {
  return {static_cast<unsigned>(m.count * m.s.H), tiles_of(rows), tiles_of(cols)};
}

}  // namespace

MixerChunks list_chunks(Context& ctx, const char* op, const View& proj, const View& cu_seqlens,
                        int64_t Q, ScratchScope& scope) {
  const int64_t B = proj.dim(0), T = proj.dim(1);
  const bool packed = !cu_seqlens.empty();
  const int64_t sequences = sequence_count(proj, cu_seqlens);
  const int64_t per_sequence = (T + Q - 1) / Q;
  // The remainders of packed sequences are a chunk each, at most.
  const int64_t count = packed ? (T > 0 ? T / Q + sequences : 0) : B * per_sequence;
  MixerChunk* chunks = scope.take<MixerChunk>(count).data();
  int32_t* offsets = scope.take<int32_t>(sequences + 1).data();
  if (count > 0 && !packed) {
    launch(ctx, op, fill_even_chunks,
           {.blocks = blocks_for(std::max(count, sequences + 1), kThreads), .threads = kThreads}, T,
           sequences, per_sequence, Q, offsets, chunks);
  } else if (count > 0) {
    const int32_t* cu = data<int32_t>(cu_seqlens);
    launch(ctx, op, count_chunks, {.blocks = 1, .threads = kListThreads}, cu, sequences, Q,
           offsets);
    launch(ctx, op, fill_chunks, {.blocks = blocks_for(count, kThreads), .threads = kThreads}, cu,
           sequences, Q, offsets, count, chunks);
  }
  return {chunks, offsets, count, sequences, packed ? 0 : per_sequence};
}

MixerSegment empty_segment(const MixerShape& s, const MixerParams& params,
                           const MixerChunks& chunks, int64_t Q) {
  MixerSegment m{};
  m.s = s;
  m.w = MixerWeights(params);
  m.Q = static_cast<int>(Q);
  m.M = static_cast<int>(Q * s.R);
  m.sequences = static_cast<int>(chunks.sequences);
  m.chunks = chunks.chunks;
  m.offsets = chunks.offsets;
  return m;
}

MixerSegment take_segment(const MixerShape& s, const MixerParams& params, const MixerChunks& chunks,
                          int64_t count, int64_t Q, bool with_scores, ScratchScope& scope) {
  const int64_t M = Q * s.R, heads = count * s.H;
  const auto take = [&](int64_t n) { return scope.take<float>(n).data(); };
  MixerSegment m = empty_segment(s, params, chunks, Q);
  m.theta = take(count * Q * s.S);
  m.rstd = take(count * Q * 2 * s.R * s.G);
  m.dt = take(heads * Q);
  m.gamma = take(heads * Q);
  m.scale = take(heads * Q);
  m.c = take(heads * Q);
  m.c_low = take(heads * Q);
  m.from_start = take(heads * M);
  m.to_end = take(heads * M);
  m.angle = take(heads * Q * s.S);
  m.start_angle = take(heads * s.S);
  m.q = take(heads * M * s.N);
  m.k = take(heads * M * s.N);
  m.v = take(heads * M * s.P);
  m.y = take(heads * M * s.P);
  m.state = take(heads * s.P * s.N);
  m.weights = take(heads * M * M);
  if (with_scores) m.scores = take(heads * M * M);
  return m;
}

MixerCarry take_carry(const MixerShape& s, ScratchScope& scope) {
  return {scope.take<float>(s.H * s.P * s.N).data(), scope.take<float>(s.H * s.S).data()};
}

void move_segment(MixerSegment& segment, const MixerChunks& chunks, int64_t first, int64_t count) {
  segment.first = static_cast<int>(first);
  segment.count = static_cast<int>(std::min(count, chunks.count - first));
  segment.chunks = chunks.chunks + first;
}

unsigned walks_of(const MixerSegment& m, const MixerChunks& chunks) {
  constexpr int64_t kMost = 1024;
  const int64_t last = m.first + m.count - 1;
  const int64_t sequences = chunks.per_sequence > 0
                                ? last / chunks.per_sequence - m.first / chunks.per_sequence + 1
                                : std::min<int64_t>(chunks.sequences, m.count);
  return static_cast<unsigned>(std::min(sequences, kMost));
}

void segment_outer_products(Context& ctx, const char* op, const MixerSegment& m, const float* a,
                            const float* b, const float* scale, float* out) {
  launch(ctx, op, outer_products, {.blocks = by_tiles(m, m.s.P, m.s.N), .threads = kTileThreads}, m,
         a, b, scale, out);
}

void segment_states(Context& ctx, const char* op, const MixerSegment& m, const MixerChunks& chunks,
                    const View& proj, const MixerState& pool, const MixerCarry& in,
                    const MixerCarry& out, bool finish, bool with_q) {
  const MixerShape& s = m.s;
  const unsigned tokens = static_cast<unsigned>(m.count * m.Q);
  const unsigned walks = walks_of(m, chunks);
  const auto blocks = [&](int64_t items) { return blocks_for(items, kThreads); };
  visit_activation(proj.dtype, [&]<typename T>() {
    const MixerRows<const T> rows(proj);
    launch(ctx, op, token_terms<T>, {.blocks = tokens, .threads = 128}, m, rows);
    launch(ctx, op, chunk_terms<T>,
           {.blocks = {static_cast<unsigned>(m.count), blocks_for(s.H, kTermHeads)},
            .threads = {kTermHeads, kTermTokens},
            .shared_bytes = static_cast<size_t>(m.Q) * (kTermHeads + 1) * sizeof(float)},
           m, rows);
    if (s.S > 0) {
      float* angle = pool.empty() ? nullptr : data<float>(pool.angle);
      launch(ctx, op, chunk_angles, {.blocks = blocks(m.count * s.H * s.S), .threads = kThreads},
             m);
      launch(ctx, op, walk_angles, {.blocks = {blocks(s.H * s.S), walks}, .threads = kThreads}, m,
             angle, data<int32_t>(pool.rows), finish ? angle : nullptr, in.angle, out.angle);
    }
    launch(ctx, op, keys_queries<T>,
           {.blocks = {tokens, blocks(s.H * (s.N - s.S))}, .threads = kThreads}, m, rows, with_q);
    launch(ctx, op, values<T>, {.blocks = {tokens, blocks(s.H * s.P)}, .threads = kThreads}, m,
           rows);
  });
  segment_outer_products(ctx, op, m, m.v, m.k, m.to_end, m.state);
  const DType dtype = pool.empty() ? DType::f32 : pool.ssm.dtype;
  visit_activation(dtype, [&]<typename S>() {
    launch(ctx, op, walk_states<S>,
           {.blocks = {blocks(s.H * s.P * s.N), walks}, .threads = kThreads}, m, MixerPool<S>(pool),
           finish, in.ssm, out.ssm);
  });
}

void segment_outputs(Context& ctx, const char* op, const MixerSegment& m) {
  launch(ctx, op, chunk_weights, {.blocks = by_tiles(m, m.M, m.M), .threads = kTileThreads}, m);
  launch(ctx, op, chunk_outputs, {.blocks = by_tiles(m, m.M, m.s.P), .threads = kTileThreads}, m);
}

}  // namespace mamba3::cuda
