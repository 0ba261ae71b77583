// The schedule. Nothing was kept by the forward. A first pass over the segments of time (see
// mixer_segment.cuh) gives the states between them, where there are several. Then the segments are
// taken in reverse; each is computed again as in the forward, and then, all chunks at once:
//   1. from d_y of the op through gate and norm to d_y of the rows; d_z
//   2. what each chunk adds to the gradient of the state, and a walk back over the chunks that
//   turns
//      it into that gradient after each chunk
//   3. d_weights = d_y v^T; its part in the decays and scales; from there the gradient of the
//   scores
//   4. d_v, d_q, d_k: two products each
//   5. back through the rotation; the angles' gradients summed over all later tokens, in the chunk
//      and by a walk back
//   6. dt, A, lam; x; B, C and the raw angle, which sum over heads
//   7. gradients of parameters: a sum a chunk, added up over the chunks in their order
// There are no atomics: the same arguments give the same bits.
//
// The first token of a segment gets a part of its gradient from the token before it, which belongs
// to the segment that is taken next: what it has so far waits in `pending`.

#include <algorithm>
#include <vector>

#include "cuda/mixer_gradients.cuh"
#include "cuda/mixer_tiles.cuh"
#include "cuda/mixer_walk.cuh"
#include "ops/mixer_scan.h"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "mixer_scan_backward";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The gradients of a segment, in scratch.
struct Gradients {
  ParamOffsets params;
  int tiles_N;  // tiles over N

  float *q, *k;        // (count, H, M, N)
  float *v, *y;        // (count, H, M, P)
  float* rstd;         // (count, H, M) of the rows of y
  float* weights;      // (count, H, M, M) then of the scores
  float* state;        // (count, H, P, N) of the state after the chunk
  float* start_state;  // (count, H, P, N) of the state before the first chunk of a sequence
  float* state_dot;    // (count, H) that state after the chunk with what is left of the one before
  float *q_dots, *k_dots;  // (count, H, M, tiles_N) parts of the gradients of decays
  float *gamma, *scale;    // (count, H, Q)
  float* c;                // (count, H, Q) then of A dt
  float* dt;               // (count, H, Q) by way of the angle
  float* carry;            // (count, H) of what is added at the start of a sequence
  float* angle;            // (count, H, Q, S) summed over the later tokens of the chunk
  float* later_angle;      // (count, H, S) over those of later chunks
  float* shared;           // (count, Q, 2, R, G, N) of B and C after norm
  float* partial;          // (count, params.end)
};

// d_y of the rows, and d_z: a warp for every token and head.
template <typename T>
__global__ void gate_backward(MixerSegment m, Gradients d, MixerRows<const T> proj,
                              MixerRows<const T> d_out, MixerRows<T> d_proj) {
  const MixerShape& s = m.s;
  const int H = static_cast<int>(s.H), P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;  // (c, t, h)
  const int h = static_cast<int>(index % H);
  const int c = static_cast<int>(index / H / m.Q), t = static_cast<int>(index / H % m.Q);
  if (c >= m.count) return;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int64_t row0 = m.at(c, h) * m.M + t * R;
  const T* z = proj.at(chunk, t) + s.z() + h * P;
  const T* d_out_row = d_out.at(chunk, t) + h * P;
  float* rstd = d.rstd + row0;
  for (int r = 0; r < R; ++r) {
    const float* y = m.y + (row0 + r) * P;
    float* d_y = d.y + (row0 + r) * P;
    float scale = 1, mean = 0;
    if (m.w.norm) {
      float squares = 0;
      for (int p = lane; p < P; p += kWarp) squares = fmaf(y[p], y[p], squares);
      scale = rsqrtf(warp_sum(squares) / static_cast<float>(P) + s.eps);
      for (int p = lane; p < P; p += kWarp) {
        const Gate gate =
            gate_of(m.s, m.w, h, r, p, y[p], scale, to_float(z[p]), to_float(d_out_row[p]));
        mean = fmaf(gate.d_gated * gate.silu * m.w.norm[h * P + p], gate.normed, mean);
      }
      mean = warp_sum(mean) / static_cast<float>(P);
    }
    if (lane == 0) rstd[r] = scale;
    for (int p = lane; p < P; p += kWarp) {
      const Gate gate =
          gate_of(m.s, m.w, h, r, p, y[p], scale, to_float(z[p]), to_float(d_out_row[p]));
      float d_normed = gate.d_gated * gate.silu;
      if (m.w.norm) d_normed = fmaf(-gate.normed, mean, d_normed * m.w.norm[h * P + p]) * scale;
      d_y[p] = d_normed;
    }
  }
  __syncwarp();
  T* d_z = d_proj.at(chunk, t) + s.z() + h * P;
  for (int p = lane; p < P; p += kWarp) {
    float sum = 0;
    for (int r = 0; r < R; ++r) {
      const Gate gate = gate_of(m.s, m.w, h, r, p, m.y[(row0 + r) * P + p], rstd[r], to_float(z[p]),
                                to_float(d_out_row[p]));
      const float up = m.w.mimo_z ? m.w.mimo_z[(h * R + r) * P + p] : 1.0f;
      sum = fmaf(gate.d_gated * gate.weighted * gate.d_silu, up, sum);
    }
    d_z[p] = from_float<T>(sum);
  }
}

// Block (c, h): D, mimo_z, mimo_o and norm.
template <typename T>
__global__ void gate_params(MixerSegment m, Gradients d, MixerRows<const T> proj,
                            MixerRows<const T> d_out) {
  __shared__ float sums[kWarps];
  const ChunkHead block(m.s);
  const int h = block.h, P = static_cast<int>(m.s.P), R = static_cast<int>(m.s.R);
  const MixerChunk chunk = m.chunks[block.c];
  if (chunk.tokens == 0) return;
  const int64_t row0 = m.at(block.c, h) * m.M;
  float* partial = d.partial + block.c * d.params.end;
  float d_D = 0;
  for (int p = static_cast<int>(threadIdx.x); p < P; p += kThreads) {
    float d_norm = 0;
    for (int r = 0; r < R; ++r) {
      float d_mimo_z = 0, d_mimo_o = 0;
      for (int t = 0; t < chunk.tokens; ++t) {
        const int64_t row = row0 + t * R + r, i = row * P + p;
        d_D = fmaf(d.y[i], m.v[i], d_D);
        if (m.w.mimo_z || m.w.norm) {
          const float z = to_float(proj.at(chunk, t)[m.s.z() + h * P + p]);
          const float out = to_float(d_out.at(chunk, t)[h * P + p]);
          const Gate gate = gate_of(m.s, m.w, h, r, p, m.y[i], d.rstd[row], z, out);
          d_mimo_z = fmaf(gate.d_gated * gate.weighted * gate.d_silu, z, d_mimo_z);
          d_mimo_o = fmaf(out * gate.weighted, gate.silu, d_mimo_o);
          d_norm = fmaf(gate.d_gated * gate.silu, gate.normed, d_norm);
        }
      }
      if (m.w.mimo_z) {
        partial[d.params.mimo_z + (h * R + r) * P + p] = d_mimo_z;
        partial[d.params.mimo_o + (h * R + r) * P + p] = d_mimo_o;
      }
    }
    if (m.w.norm) partial[d.params.norm + h * P + p] = d_norm;
  }
  d_D = block_sum(d_D, sums);
  if (threadIdx.x == 0) partial[d.params.D + h] = d_D;
}

// Turns what each chunk adds to the gradient of the state into that gradient after the chunk. A
// thread for (h, p, n).
__global__ void walk_states_back(MixerSegment m, Gradients d, float* pool, const int32_t* rows,
                                 const float* in, float* out) {
  const MixerShape& s = m.s;
  const int64_t size = s.H * s.P * s.N;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int h = static_cast<int>(index / (s.P * s.N));
  m.for_sequences([&](int sequence, int begin, int end, bool starts, bool ends) {
    float d_state = 0;
    if (!ends) {
      d_state = in[index];
    } else if (pool) {
      d_state = pool[rows[sequence] * size + index];
    }
    float next = d.state[(end - 1) * size + index];
    for (int c = end - 1; c >= begin; --c) {
      const float added = next;
      if (c > begin) next = d.state[(c - 1) * size + index];
      d.state[c * size + index] = d_state;
      d_state = fmaf(m.decay(c, h), d_state, added);
    }
    if (!starts) {
      out[index] = d_state;
    } else {
      if (pool) pool[rows[sequence] * size + index] = d_state;
      if (d.start_state) d.start_state[begin * size + index] = d_state;
    }
  });
}

// Block (c, h): the state after a chunk contains exp(c_Q) times the one before it.
__global__ void state_dots(MixerSegment m, Gradients d) {
  __shared__ float sums[kWarps];
  const ChunkHead block(m.s);
  if (m.chunks[block.c].tokens == 0) return;
  const int64_t size = m.s.P * m.s.N, at = m.at(block.c, block.h);
  float sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    sum = fmaf(d.state[at * size + i], m.state[at * size + i], sum);
  }
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) d.state_dot[at] = m.decay(block.c, block.h) * sum;
}

// Block (c, h), tile of (M, M): d_weights = d_y v^T.
__global__ void __launch_bounds__(kTileThreads) weights_backward(MixerSegment m, Gradients d) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), M = m.M;
  const int rows = m.chunks[block.c].tokens * static_cast<int>(m.s.R);
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), rows);
  if (tile.row0 >= rows || tile.col0 >= m.visible_end(tile.row0, rows)) return;
  const int64_t at = m.at(block.c, block.h);
  tile.multiply(shared, operand(d.y + at * M * P, P), operand<true>(m.v + at * M * P, P), 0, P);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) tile.store(d.weights + at * M * M, i, tile.sum[i], M);
}

// Block (c, h): from d_weights to the gradient of the scores, in place, and to those of gamma,
// scale and c as far as they enter the weights.
__global__ void __launch_bounds__(kThreads) scores_backward(MixerSegment m, Gradients d) {
  MAMBA3_DYNAMIC_SHARED(float, shared);
  constexpr int kColumns = 64, kParts = kThreads / kColumns;
  const ChunkHead block(m.s);
  const int M = m.M, R = static_cast<int>(m.s.R), tokens = m.chunks[block.c].tokens;
  if (tokens == 0) return;
  const int rows = tokens * R, thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int64_t at = m.at(block.c, block.h);
  const float *scores = m.scores + at * M * M, *weights = m.weights + at * M * M;
  float* d_weights = d.weights + at * M * M;
  const float *c = m.c + at * m.Q, *c_low = m.c_low + at * m.Q;
  const float *gamma = m.gamma + at * m.Q, *scale = m.scale + at * m.Q;
  float* row_gamma = shared;     // (M)
  float* row_c = row_gamma + M;  // (M)
  float* col_scale = row_c + M;  // (kParts, M)

  for (int i = thread / kWarp; i < rows; i += kWarps) {
    const int before = i / R * R;
    float d_gamma = 0, d_c = 0;
    for (int j = lane; j < before + R; j += kWarp) {
      const int64_t ij = int64_t{i} * M + j;
      if (j < before) {
        d_c = fmaf(d_weights[ij], weights[ij], d_c);
      } else {
        d_gamma = fmaf(d_weights[ij], scores[ij], d_gamma);
      }
    }
    d_gamma = warp_sum(d_gamma);
    d_c = warp_sum(d_c);
    if (lane == 0) row_gamma[i] = d_gamma, row_c[i] = d_c;
  }
  __syncthreads();

  for (int j = thread % kColumns; j < rows; j += kColumns) {
    const int key = j / R, part = thread / kColumns;
    float d_scale = 0;
    for (int i = part; i < rows; i += kParts) {
      const int64_t ij = int64_t{i} * M + j;
      const int t = i / R;
      if (t < key) {
        d_weights[ij] = 0;
      } else if (t == key) {
        d_weights[ij] *= gamma[t];
      } else {
        const float decay = expf(fminf(0.0f, (c[t] - c[key]) + (c_low[t] - c_low[key])));
        const float decayed = d_weights[ij] * decay;
        d_scale = fmaf(decayed, scores[ij], d_scale);
        d_weights[ij] = decayed * scale[key];
      }
    }
    col_scale[part * M + j] = d_scale;
  }
  __syncthreads();

  for (int t = thread; t < tokens; t += kThreads) {
    float d_gamma = 0, d_c = 0, d_scale = 0;
    for (int i = t * R; i < (t + 1) * R; ++i) {
      d_gamma += row_gamma[i];
      d_c += row_c[i];
      for (int part = 0; part < kParts; ++part) d_scale += col_scale[part * M + i];
    }
    d.gamma[at * m.Q + t] = d_gamma;
    d.scale[at * m.Q + t] = d_scale;
    d.c[at * m.Q + t] = fmaf(-d_scale, scale[t], d_c);
  }
}

// Multiplies the rows of a tile by scale (M).
__device__ void scale_rows(Tile& tile, const float* scale) {
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float factor = tile.row(i) < tile.rows ? scale[tile.row(i)] : 0.0f;
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) tile.sum[i][j] *= factor;
  }
}

// dots[i * tiles + tile] = the dot products of the tile's rows with those of a matrix.
__device__ void dot_rows(const Tile& tile, const float* matrix, float* dots, int tiles) {
  constexpr int kLanes = kTile / Tile::kCols;  // threads that share a row, in one warp
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    float dot = 0;
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      if (tile.row(i) < tile.rows && tile.col() + j < tile.cols) {
        const int64_t at = int64_t{tile.row(i)} * tile.cols + tile.col() + j;
        dot = fmaf(tile.sum[i][j], matrix[at], dot);
      }
    }
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) dot += __shfl_xor_sync(~0u, dot, lane);
    if (tile.col() == tile.col0 && tile.row(i) < tile.rows) {
      dots[int64_t{tile.row(i)} * tiles + tile.col0 / kTile] = dot;
    }
  }
}

// Block (c, h), tile of (M, P): d_v = W^T d_y + D d_y + w_j Z^T k_j.
__global__ void __launch_bounds__(kTileThreads) values_backward(MixerSegment m, Gradients d) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), N = static_cast<int>(m.s.N), M = m.M;
  const int R = static_cast<int>(m.s.R), rows = m.chunks[block.c].tokens * R;
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), P);
  if (tile.row0 >= rows) return;
  const int64_t at = m.at(block.c, block.h);
  const float* d_y = d.y + at * M * P;
  tile.multiply(shared, operand(m.k + at * M * N, N), operand<true>(d.state + at * P * N, N), 0, N);
  scale_rows(tile, m.to_end + at * M);
  tile.multiply(shared, operand<true>(m.weights + at * M * M, M), operand(d_y, P),
                tile.row0 / R * R, rows);
  const float D = m.w.D[block.h];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    if (tile.row(i) >= rows) break;
#pragma unroll
    for (int j = 0; j < Tile::kCols; ++j) {
      if (tile.col() + j < P) {
        const int64_t from = int64_t{tile.row(i)} * P + tile.col() + j;
        tile.sum[i][j] = fmaf(D, d_y[from], tile.sum[i][j]);
      }
    }
    tile.store(d.v + at * M * P, i, tile.sum[i]);
  }
}

// Block (c, h), tile of (M, N): d_q = d_scores k + exp(c_t) S^T d_y.
__global__ void __launch_bounds__(kTileThreads) queries_backward(MixerSegment m, Gradients d) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), N = static_cast<int>(m.s.N), M = m.M;
  const int rows = m.chunks[block.c].tokens * static_cast<int>(m.s.R);
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), N);
  if (tile.row0 >= rows) return;
  const int64_t at = m.at(block.c, block.h);
  tile.multiply(shared, operand(d.y + at * M * P, P), operand(m.state + at * P * N, N), 0, P);
  scale_rows(tile, m.from_start + at * M);
  dot_rows(tile, m.q + at * M * N, d.q_dots + at * M * d.tiles_N, d.tiles_N);
  tile.multiply(shared, operand(d.weights + at * M * M, M), operand(m.k + at * M * N, N), 0,
                m.visible_end(tile.row0, rows));
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) tile.store(d.q + at * M * N, i, tile.sum[i]);
}

// Block (c, h), tile of (M, N): d_k = d_scores^T q + w_j Z v_j.
__global__ void __launch_bounds__(kTileThreads) keys_backward(MixerSegment m, Gradients d) {
  __shared__ Tile::Shared shared;
  const ChunkHead block(m.s);
  const int P = static_cast<int>(m.s.P), N = static_cast<int>(m.s.N), M = m.M;
  const int R = static_cast<int>(m.s.R), rows = m.chunks[block.c].tokens * R;
  Tile tile(static_cast<int>(blockIdx.y), rows, static_cast<int>(blockIdx.z), N);
  if (tile.row0 >= rows) return;
  const int64_t at = m.at(block.c, block.h);
  tile.multiply(shared, operand(m.v + at * M * P, P), operand(d.state + at * P * N, N), 0, P);
  dot_rows(tile, m.k + at * M * N, d.k_dots + at * M * d.tiles_N, d.tiles_N);
  scale_rows(tile, m.to_end + at * M);
  tile.multiply(shared, operand<true>(d.weights + at * M * M, M), operand(m.q + at * M * N, N),
                tile.row0 / R * R, rows);
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) tile.store(d.k + at * M * N, i, tile.sum[i]);
}

// Keys and queries of the token of blockIdx.x, back through the rotation, in place; a thread turns
// one pair of every rank. d_k_prev (pool) reaches the key of the last token.
__global__ void rotation_backward(MixerSegment m, Gradients d, const float* d_k_prev,
                                  const int32_t* pool_rows) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int H = static_cast<int>(s.H), N = static_cast<int>(s.N), S = static_cast<int>(s.S);
  const int R = static_cast<int>(s.R), parts = N - S;
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index >= H * parts) return;
  const int h = index / parts, i = index % parts;
  const RotaryPart part = rotary_part(s, i);
  const bool last = chunk.last && t + 1 == chunk.tokens && d_k_prev;
  const int64_t at_angle = (m.at(c, h) * m.Q + t) * S + i;
  float cosine = 1, sine = 0, d_angle = 0;
  if (part.pair) sincosf(m.start_angle[m.at(c, h) * S + i] + m.angle[at_angle], &sine, &cosine);
  for (int r = 0; r < R; ++r) {
    const int64_t row = (m.at(c, h) * m.M + t * R + r) * N;
    const int64_t prev = last ? ((int64_t{pool_rows[chunk.sequence]} * R + r) * H + h) * N : 0;
    const auto back = [&](const float* rotated, float* d_rotated, bool is_key) {
      const auto gradient = [&](int n) {
        return d_rotated[n] + (is_key && last ? d_k_prev[prev + n] : 0.0f);
      };
      const float d_a = gradient(part.a);
      if (!part.pair) {
        d_rotated[part.a] = d_a;
        return;
      }
      // d rot / d angle of a pair (a, b) is (-b, a).
      const float d_b = gradient(part.b);
      d_angle = fmaf(-d_a, rotated[part.b], fmaf(d_b, rotated[part.a], d_angle));
      d_rotated[part.a] = fmaf(d_a, cosine, d_b * sine);
      d_rotated[part.b] = fmaf(d_b, cosine, -d_a * sine);
    };
    back(m.k + row, d.k + row, true);
    back(m.q + row, d.q + row, false);
  }
  if (part.pair) d.angle[at_angle] = d_angle;
}

// The biases of B and C: blockIdx.y is the chunk, and a thread has (h, r, n) of both.
__global__ void bias_params(MixerSegment m, Gradients d) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.y), tokens = m.chunks[c].tokens;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (tokens == 0 || index >= s.H * s.R * s.N) return;
  const int64_t n = index % s.N, r = index / s.N % s.R;
  const int h = static_cast<int>(index / s.N / s.R);
  const int64_t first = (m.at(c, h) * m.M + r) * s.N + n;
  float d_B = 0, d_C = 0;
  for (int t = 0; t < tokens; ++t) {
    d_B += d.k[first + t * s.R * s.N];
    d_C += d.q[first + t * s.R * s.N];
  }
  float* partial = d.partial + c * d.params.end;
  partial[d.params.B_bias + index] = d_B;
  partial[d.params.C_bias + index] = d_C;
}

// A token's angle is in those of all later tokens: sums within a chunk. A thread for (c, h, i).
__global__ void angles_backward(MixerSegment m, Gradients d) {
  const int S = static_cast<int>(m.s.S), H = static_cast<int>(m.s.H);
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= int64_t{m.count} * H * S) return;
  const int64_t head = index / S;
  float* angle = d.angle + head * m.Q * S + index % S;
  float sum = 0;
  for (int t = m.chunks[head / H].tokens - 1; t >= 0; --t) {
    sum += angle[int64_t{t} * S];
    angle[int64_t{t} * S] = sum;
  }
}

// And over later chunks. A thread for (h, i).
__global__ void walk_angles_back(MixerSegment m, Gradients d, float* pool, const int32_t* rows,
                                 const float* in, float* out) {
  const int64_t S = m.s.S, size = m.s.H * S;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= size) return;
  const int64_t h = index / S, i = index % S;
  m.for_sequences([&](int sequence, int begin, int end, bool starts, bool ends) {
    float sum = 0;
    if (!ends) {
      sum = in[index];
    } else if (pool) {
      sum = pool[rows[sequence] * size + index];
    }
    for (int c = end - 1; c >= begin; --c) {
      d.later_angle[c * size + index] = sum;
      sum += d.angle[(c * m.s.H + h) * m.Q * S + i];
    }
    if (!starts) {
      out[index] = sum;
    } else if (pool) {
      pool[rows[sequence] * size + index] = sum;
    }
  });
}

// d dt by way of the angle: a warp for every token and head.
__global__ void angle_steps_backward(MixerSegment m, Gradients d) {
  const int H = static_cast<int>(m.s.H), S = static_cast<int>(m.s.S);
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;  // (c, h, t)
  const int64_t head = index / m.Q;
  const int c = static_cast<int>(head / H), t = static_cast<int>(index % m.Q);
  if (c >= m.count || t >= m.chunks[c].tokens) return;
  const float* theta = m.theta + (int64_t{c} * m.Q + t) * S;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < S; i += kWarp) {
    sum = fmaf(theta[i], d.angle[index * S + i] + d.later_angle[head * S + i], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) d.dt[index] = sum;
}

// d_x of the token of blockIdx.x for all heads. d_v_prev (pool) reaches x of the last token.
template <typename T>
__global__ void inputs_backward(MixerSegment m, Gradients d, MixerRows<T> d_proj,
                                const float* d_v_prev, const int32_t* pool_rows) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index >= s.H * P) return;
  const int h = index / P, p = index % P;
  float sum = 0;
  for (int r = 0; r < R; ++r) {
    const float up = m.w.mimo_x ? m.w.mimo_x[(h * R + r) * P + p] : 1.0f;
    sum = fmaf(d.v[(m.at(c, h) * m.M + t * R + r) * P + p], up, sum);
  }
  if (d_v_prev && chunk.last && t + 1 == chunk.tokens) {
    sum += d_v_prev[pool_rows[chunk.sequence] * s.H * P + index];
  }
  d_proj.at(chunk, t)[s.x() + index] = from_float<T>(sum);
}

// mimo_x: blockIdx.y is the chunk, and a thread has (h, r, p).
template <typename T>
__global__ void inputs_params(MixerSegment m, Gradients d, MixerRows<const T> proj) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.y);
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0 || index >= s.H * s.R * s.P) return;
  const int64_t p = index % s.P, r = index / s.P % s.R;
  const int h = static_cast<int>(index / s.P / s.R);
  float sum = 0;
  for (int t = 0; t < chunk.tokens; ++t) {
    const float x = to_float(proj.at(chunk, t)[s.x() + h * s.P + p]);
    sum = fmaf(d.v[(m.at(c, h) * m.M + t * s.R + r) * s.P + p], x, sum);
  }
  d.partial[c * d.params.end + d.params.mimo_x + index] = sum;
}

// Block (c, h) of the first chunk of a sequence, which began from
// S + carry sum_r v_prev_r k_prev_r^T. After all that reads the gradient of the final state.
__global__ void __launch_bounds__(kThreads)
    initial_backward(MixerSegment m, Gradients d, const float* k_prev, const float* v_prev,
                     const int32_t* rows, float* d_k_prev, float* d_v_prev, const int32_t* d_rows) {
  __shared__ float sums[kWarps];
  const MixerShape& s = m.s;
  const ChunkHead block(s);
  const int h = block.h;
  const MixerChunk chunk = m.chunks[block.c];
  if (!chunk.first) return;
  const int H = static_cast<int>(s.H), P = static_cast<int>(s.P), N = static_cast<int>(s.N);
  const int R = static_cast<int>(s.R), thread = static_cast<int>(threadIdx.x);
  const int64_t at = m.at(block.c, h);
  if (d_k_prev) {
    d_k_prev += (int64_t{d_rows[chunk.sequence]} * R * H + h) * N;  // rank r: + r H N
    d_v_prev += (int64_t{d_rows[chunk.sequence]} * H + h) * P;
  }
  if (!k_prev) {
    if (thread == 0) d.carry[at] = 0;
    if (!d_k_prev) return;
    for (int i = thread; i < R * N; i += kThreads) d_k_prev[int64_t{i / N} * H * N + i % N] = 0;
    for (int p = thread; p < P; p += kThreads) d_v_prev[p] = 0;
    return;
  }
  const CarryGradients gradients = {
      .k_prev = k_prev + (int64_t{rows[chunk.sequence]} * R * H + h) * N,
      .v_prev = v_prev + (int64_t{rows[chunk.sequence]} * H + h) * P,
      .d_k_prev = d_k_prev,
      .d_v_prev = d_v_prev,
      .d_mimo_x =
          m.w.mimo_x ? d.partial + block.c * d.params.end + d.params.mimo_x + h * R * P : nullptr};
  const float d_carry = gradients.run(s, m.w, h, d.start_state + at * P * N,
                                      m.dt[at * m.Q] - m.gamma[at * m.Q], sums);
  if (thread == 0) d.carry[at] = d_carry;
}

// Block (c, h), a thread a token: all that enters c and scale; then c becomes A dt, a sum over the
// tokens from here to the end of the chunk.
__global__ void decays_backward(MixerSegment m, Gradients d) {
  MAMBA3_DYNAMIC_SHARED(float, shared);
  const ChunkHead block(m.s);
  const int t = static_cast<int>(threadIdx.x), tokens = m.chunks[block.c].tokens;
  const int R = static_cast<int>(m.s.R);
  const int64_t at = m.at(block.c, block.h) * m.Q;
  float* d_c = shared;           // (Q)
  float* d_last = shared + m.Q;  // (Q) parts of that of c_Q
  if (t < tokens) {
    float q_dot = 0, k_dot = 0;
    for (int64_t i = (at + t) * R * d.tiles_N; i < (at + t + 1) * R * d.tiles_N; ++i) {
      q_dot += d.q_dots[i];
      k_dot += d.k_dots[i];
    }
    const int last = tokens - 1;
    const float decay =
        expf((m.c[at + last] - m.c[at + t]) + (m.c_low[at + last] - m.c_low[at + t]));
    const float d_to_end = decay * m.scale[at + t] * k_dot;
    d.scale[at + t] = fmaf(decay, k_dot, d.scale[at + t]);
    d_c[t] = d.c[at + t] + q_dot - d_to_end;
    d_last[t] = d_to_end;
  }
  __syncthreads();
  if (t == 0 && tokens > 0) {
    float sum = d.state_dot[m.at(block.c, block.h)];
    for (int i = 0; i < tokens; ++i) sum += d_last[i];
    for (int i = tokens - 1; i >= 0; --i) {
      sum += d_c[i];
      d_c[i] = sum;
    }
  }
  __syncthreads();
  if (t < tokens) d.c[at + t] = d_c[t];
}

// Block (c, h), a thread a token: gamma_t = lam_t dt_t, carry_t = (1 - lam_t) dt_t,
// scale_t = gamma_t + carry_{t+1}; then to dd_dt, dd_A and trap. What the first token of the
// segment lacks is in the segment before it: (d_gamma, the rest of d_dt) of each head wait in
// `pending` and are taken up from `waiting` by the last token there.
template <typename T>
__global__ void terms_backward(MixerSegment m, Gradients d, MixerRows<const T> proj,
                               MixerRows<T> d_proj, const float* waiting, float* pending) {
  __shared__ float sums[kWarp];
  const MixerShape& s = m.s;
  const ChunkHead block(s);
  const int c = block.c, h = block.h, t = static_cast<int>(threadIdx.x);
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0) return;
  const int64_t head = m.at(c, h), at = head * m.Q + t;
  float d_raw = 0, d_A_log = 0;
  if (t < chunk.tokens) {
    const T* row = proj.at(chunk, t);
    T* d_row = d_proj.at(chunk, t);
    const float d_A_dt = d.c[at], d_gamma = d.gamma[at] + d.scale[at];
    const float rate = decay_rate(s, m.w, row, h);
    float d_rest = -rate * d_A_dt;
    if (s.has_dd_A()) {
      const float slope = decay_act_derivative(s.decay_act, to_float(row[s.dd_A() + h]));
      const float d_A = rate > s.A_floor ? -slope * m.dt[at] * d_A_dt : 0.0f;
      d_row[s.dd_A() + h] = from_float<T>(d_A);
    } else {
      d_A_log = m.dt[at] * d_rest;
    }
    if (s.has_angles()) d_rest += d.dt[at];
    if (t == 0 && c == 0 && !chunk.first) {
      pending[h] = d_gamma;
      pending[s.H + h] = d_rest;
    } else {
      // The chunk before is full, so its last token is the one right before in memory, of its head.
      const float d_carry = t > 0         ? d.scale[at - 1]
                            : chunk.first ? d.carry[head]
                                          : d.scale[(head - s.H) * m.Q + m.Q - 1];
      d_raw = step_backward(m.s, m.w, row, d_row, h, d_gamma, d_carry, d_rest);
    }
    if (t + 1 == chunk.tokens && c + 1 == m.count && !chunk.last) {
      d_raw += step_backward(m.s, m.w, proj.at(chunk, t + 1), d_proj.at(chunk, t + 1), h,
                             waiting[h], d.scale[at], waiting[s.H + h]);
    }
  }
  float* partial = d.partial + c * d.params.end;
  d_raw = block_sum(d_raw, sums);
  if (t == 0) partial[d.params.dt_bias + h] = d_raw;
  if (s.has_dd_A()) return;
  d_A_log = block_sum(d_A_log, sums);
  if (t == 0) partial[d.params.A_log + h] = d_A_log;
}

// The rows of B and C of the token of blockIdx.x, a warp a row: the sum over the heads of a group,
// then back through the norm.
template <typename T>
__global__ void groups_backward(MixerSegment m, Gradients d, MixerRows<const T> proj,
                                MixerRows<T> d_proj) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int N = static_cast<int>(s.N), R = static_cast<int>(s.R), G = static_cast<int>(s.G);
  const int group = static_cast<int>(s.H) / G, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int i = static_cast<int>(blockIdx.y * kWarps + threadIdx.x / kWarp);  // (B or C, r, g)
  if (i >= 2 * R * G) return;
  const bool is_B = i < R * G;
  const int r = i % (R * G) / G, g = i % G;
  const float* from = is_B ? d.k : d.q;
  const float* weight = is_B ? m.w.B_norm : m.w.C_norm;
  const T* raw = proj.at(chunk, t) + s.B() + i * N;  // C follows B
  T* d_raw = d_proj.at(chunk, t) + s.B() + i * N;
  const int64_t row = int64_t{blockIdx.x} * 2 * R * G + i;
  float* d_out = d.shared + row * N;
  const float rstd = m.rstd[row];
  float mean = 0;
  for (int n = lane; n < N; n += kWarp) {
    float sum = 0;
    for (int h = g * group; h < (g + 1) * group; ++h) {
      sum += from[(m.at(c, h) * m.M + t * R + r) * N + n];
    }
    if (!s.bc_norm) {
      d_raw[n] = from_float<T>(sum);
      continue;
    }
    d_out[n] = sum;
    mean = fmaf(sum * weight[n], to_float(raw[n]) * rstd, mean);
  }
  if (!s.bc_norm) return;
  mean = warp_sum(mean) / static_cast<float>(N);
  for (int n = lane; n < N; n += kWarp) {
    const float normed = to_float(raw[n]) * rstd;
    d_raw[n] = from_float<T>(fmaf(-normed, mean, d_out[n] * weight[n]) * rstd);
  }
}

// The weights of the norms of B and C: blockIdx.y is the chunk, and a thread has (B or C, n).
template <typename T>
__global__ void norm_params(MixerSegment m, Gradients d, MixerRows<const T> proj) {
  const int c = static_cast<int>(blockIdx.y);
  const MixerChunk chunk = m.chunks[c];
  const int N = static_cast<int>(m.s.N), RG = static_cast<int>(m.s.R * m.s.G);
  const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (chunk.tokens == 0 || index >= 2 * N) return;
  const int n = index % N, first = index / N * RG;
  float sum = 0;
  for (int t = 0; t < chunk.tokens; ++t) {
    const T* raw = proj.at(chunk, t) + m.s.B();
    const int64_t token = (int64_t{c} * m.Q + t) * 2 * RG;
    for (int i = first; i < first + RG; ++i) {
      sum = fmaf(d.shared[(token + i) * N + n], to_float(raw[i * N + n]) * m.rstd[token + i], sum);
    }
  }
  d.partial[c * d.params.end + d.params.B_norm + index] = sum;  // that of C follows
}

// theta = pi tanh(angle), so d theta / d angle = pi - theta^2 / pi. The token of blockIdx.x.
template <typename T>
__global__ void theta_backward(MixerSegment m, Gradients d, MixerRows<T> d_proj) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / m.Q, t = static_cast<int>(blockIdx.x) % m.Q;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const int H = static_cast<int>(s.H), S = static_cast<int>(s.S);
  for (int i = static_cast<int>(threadIdx.x); i < S; i += static_cast<int>(blockDim.x)) {
    float sum = 0;
    for (int h = 0; h < H; ++h) {
      const int64_t at = m.at(c, h);
      const float d_angle = d.angle[(at * m.Q + t) * S + i] + d.later_angle[at * S + i];
      sum = fmaf(m.dt[at * m.Q + t], d_angle, sum);
    }
    const float theta = m.theta[int64_t{blockIdx.x} * S + i];
    d_proj.at(chunk, t)[s.angle() + i] = from_float<T>(sum * fmaf(-theta / kPi, theta, kPi));
  }
}

Gradients take_gradients(const MixerShape& s, int64_t count, int64_t Q, bool with_initial,
                         ScratchScope& scope) {
  const int64_t M = Q * s.R, heads = count * s.H;
  const auto take = [&](int64_t n) { return scope.take<float>(n).data(); };
  const ParamOffsets params(s);
  const int64_t tiles_N = tiles_of(s.N);
  return {.params = params,
          .tiles_N = static_cast<int>(tiles_N),
          .q = take(heads * M * s.N),
          .k = take(heads * M * s.N),
          .v = take(heads * M * s.P),
          .y = take(heads * M * s.P),
          .rstd = take(heads * M),
          .weights = take(heads * M * M),
          .state = take(heads * s.P * s.N),
          .start_state = with_initial ? take(heads * s.P * s.N) : nullptr,
          .state_dot = take(heads),
          .q_dots = take(heads * M * tiles_N),
          .k_dots = take(heads * M * tiles_N),
          .gamma = take(heads * Q),
          .scale = take(heads * Q),
          .c = take(heads * Q),
          .dt = take(heads * Q),
          .carry = take(heads),
          .angle = take(heads * Q * s.S),
          .later_angle = take(heads * s.S),
          .shared = take(count * Q * 2 * s.R * s.G * s.N),
          .partial = take(count * params.end)};
}

// The gradients of a segment that has been computed; those of the state and the angle at its end
// are in `in`, and those at its start go to `out`.
template <typename T>
void segment_backward(Context& ctx, const MixerScanBackwardArgs& args, const MixerSegment& m,
                      const Gradients& d, const MixerChunks& chunks, const MixerCarry& in,
                      const MixerCarry& out, const float* waiting, float* pending) {
  const MixerShape& s = m.s;
  const unsigned walks = walks_of(m, chunks), count = static_cast<unsigned>(m.count);
  const unsigned heads = static_cast<unsigned>(m.count * s.H);
  const unsigned tokens = static_cast<unsigned>(m.count * m.Q);
  const auto blocks = [](int64_t items) { return blocks_for(items, kThreads); };
  const auto tiles = [&](int64_t rows, int64_t cols) {
    return dim3(heads, tiles_of(rows), tiles_of(cols));
  };
  const auto run = [&](auto kernel, dim3 grid, int threads, int64_t shared_floats, auto... more) {
    launch(ctx, kOp, kernel,
           {.blocks = grid,
            .threads = static_cast<unsigned>(threads),
            .shared_bytes = static_cast<size_t>(shared_floats) * sizeof(float)},
           m, d, more...);
  };
  const MixerRows<const T> proj(args.proj), d_y(args.d_y);
  const MixerRows<T> d_proj(args.d_proj);
  const MixerPool<float> final(args.d_state);
  const int token_threads = (m.Q + kWarp - 1) / kWarp * kWarp;

  run(gate_backward<T>, blocks_for(int64_t{tokens} * s.H, kWarps), kThreads, 0, proj, d_y, d_proj);
  run(gate_params<T>, heads, kThreads, 0, proj, d_y);

  segment_outer_products(ctx, kOp, m, d.y, m.q, m.from_start, d.state);
  run(walk_states_back, {blocks(s.H * s.P * s.N), walks}, kThreads, 0, final.ssm, final.rows,
      in.ssm, out.ssm);
  run(state_dots, heads, kThreads, 0);

  run(weights_backward, tiles(m.M, m.M), kTileThreads, 0);
  run(scores_backward, heads, kThreads, 6 * int64_t{m.M});
  run(values_backward, tiles(m.M, s.P), kTileThreads, 0);
  run(queries_backward, tiles(m.M, s.N), kTileThreads, 0);
  run(keys_backward, tiles(m.M, s.N), kTileThreads, 0);

  run(rotation_backward, {tokens, blocks(s.H * (s.N - s.S))}, kThreads, 0, final.k_prev,
      final.rows);
  if (s.bc_bias) run(bias_params, {blocks(s.H * s.R * s.N), count}, kThreads, 0);
  if (s.S > 0) {
    run(angles_backward, blocks(m.count * s.H * s.S), kThreads, 0);
    run(walk_angles_back, {blocks(s.H * s.S), walks}, kThreads, 0, final.angle, final.rows,
        in.angle, out.angle);
  }
  if (s.has_angles()) {
    run(angle_steps_backward, blocks_for(int64_t{heads} * m.Q, kWarps), kThreads, 0);
    run(theta_backward<T>, tokens, 64, 0, d_proj);
  }

  run(inputs_backward<T>, {tokens, blocks(s.H * s.P)}, kThreads, 0, d_proj, final.v_prev,
      final.rows);
  if (s.mimo) run(inputs_params<T>, {blocks(s.H * s.R * s.P), count}, kThreads, 0, proj);
  run(initial_backward, heads, kThreads, 0, data<const float>(args.initial.k_prev),
      data<const float>(args.initial.v_prev), data<const int32_t>(args.initial.rows), final.k_prev,
      final.v_prev, final.rows);

  run(decays_backward, heads, token_threads, 2 * int64_t{m.Q});
  run(terms_backward<T>, heads, token_threads, 0, proj, d_proj, waiting, pending);
  run(groups_backward<T>, {tokens, blocks_for(2 * s.R * s.G, kWarps)}, kThreads, 0, proj, d_proj);
  if (s.bc_norm) run(norm_params<T>, {blocks(2 * s.N), count}, kThreads, 0, proj);
  add_params(ctx, kOp, d.partial, m.count, m.chunks, d.params, 0, d.params.end,
             MixerWeights(args.d_params));
}

}  // namespace

void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args) {
  const MixerShape& s = args.shape;
  if (!s.out_norm && args.schedule == MixerSchedule::best &&
      mixer_scan_has_tiles(s, args.proj, args.d_y, args.chunk) &&
      mixer_scan_has_tiles(s, args.d_proj, args.d_y, args.chunk) &&
      mixer_scan_backward_fits_tiles(*ctx.stream, s)) {
    return mixer_scan_backward_tiles(ctx, args);
  }
  const bool plain = !s.out_norm && args.initial.empty() && args.d_state.empty();
  const int64_t sequences = sequence_count(args.proj, args.cu_seqlens);
  if (plain && walks(ctx, s, args.schedule, sequences, {args.proj, args.d_y, args.d_proj},
                     /*backward=*/true)) {
    const int64_t size = mixer_scan_walk_batch(s, mixer_scan_walk_chunk(s.R, args.chunk), sequences,
                                               args.proj.dim(1), !args.cu_seqlens.empty());
    if (size > 0) return mixer_scan_backward_walk(ctx, args, sequences, size);
  }
  const int64_t Q = mixer_scan_chunk(s, args.chunk, args.proj.dim(1));
  ScratchScope scope(ctx.scratch);
  const MixerChunks chunks = list_chunks(ctx, kOp, args.proj, args.cu_seqlens, Q, scope);
  if (chunks.count == 0) return;
  const int64_t size = std::min(chunks.count, mixer_scan_segment(s, Q, true));
  const int64_t segments = (chunks.count + size - 1) / size;
  MixerSegment m = take_segment(s, args.params, chunks, size, Q, true, scope);
  const Gradients d = take_gradients(s, size, Q, !args.initial.empty(), scope);
  std::vector<MixerCarry> states;  // at the start of each segment, and where the last one goes
  for (int64_t i = 0; i <= segments; ++i) states.push_back(take_carry(s, scope));
  MixerCarry in = take_carry(s, scope), out = take_carry(s, scope);
  float* waiting = scope.take<float>(2 * s.H).data();
  float* pending = scope.take<float>(2 * s.H).data();

  const auto compute = [&](int64_t i, bool with_q) {
    move_segment(m, chunks, i * size, size);
    const auto at = static_cast<size_t>(i);
    segment_states(ctx, kOp, m, chunks, args.proj, args.initial, states[at], states[at + 1],
                   /*finish=*/false, with_q);
  };
  for (int64_t i = 0; i + 1 < segments; ++i) compute(i, false);
  for (int64_t i = segments; i-- > 0;) {
    compute(i, true);
    segment_outputs(ctx, kOp, m);
    visit_activation(args.proj.dtype, [&]<typename T>() {
      segment_backward<T>(ctx, args, m, d, chunks, in, out, waiting, pending);
    });
    std::swap(in, out);
    std::swap(waiting, pending);
  }
}

}  // namespace mamba3::cuda
