// The schedule is in mixer_walk.cuh. Nothing was kept by the forward. A block walks the chunks of a
// head of a sequence forward and leaves the state and the angles before each in scratch, then takes
// them in reverse with the gradient Z of the state. A chunk of the way back has eight phases:
//   1. as in the forward; d_y of the rows by way of the gate; the state from scratch
//   2. keys and queries turned; d_y scaled for Z
//   3. q k^T and d_y v^T; exp(c_t) S q; w_j Z k
//   4. W and the gradient of the scores
//   5. y, d_v, d_q, d_k
//   6. d_q and d_k back through the rotation; Z before the chunk; d_z, d_x
//   7. rows of d_k, d_q and angles to scratch; biases; sums of angles over later tokens
//   8. decays and step sizes, by one warp, while the others begin with the next chunk
// Then heads_backward() sums the rows over the heads, back through the norms and the raw angle. The
// gradients of the parameters are a row for every sequence (the norms': for some tokens), added in
// their order. There are no atomics: the same arguments give the same bits.

#include <algorithm>

#include "cuda/mixer_gradients.cuh"
#include "cuda/mixer_walk.cuh"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "mixer_scan_backward";
constexpr int kThreads = 256, kWarps = kThreads / kWarp;
static_assert(kWarps == kWalkColumnParts);
constexpr int kHeadTokens = 32;  // of a block of heads_backward

// The gradients of a token and head: (R, N) of keys, (R, N) of queries, (S) of theta.
struct HeadRows {
  float* data;
  int64_t size;  // a multiple of 4
  int64_t H, T;

  __device__ float* at(const MixerChunk& part, int t, int h) const {
    return data + ((part.batch * T + part.start + t) * H + h) * size;
  }
};

template <typename T>
struct Backward {
  WalkInputs<T> in;
  MixerRows<const T> d_out;
  MixerRows<T> d_proj;
  ParamOffsets params;
  HeadRows rows;
  float* states;   // (chunks, H, P, N) of the space, before each chunk
  double* angles;  // (chunks, H, S)
  float* partial;  // (sequences, params.B_norm)
};

template <typename T>
using BackwardWalk = Walk<T, kThreads>;

// A chunk of the way back.
template <typename T>
struct BackwardChunk {
  const Backward<T>& args;
  const BackwardWalk<T>& walk;
  const MixerShape& s;
  const WalkSpace& m;
  MixerChunk part;
  TokenRows<const T> proj, d_out;
  TokenRows<T> d_proj;

  __device__ BackwardChunk(const Backward<T>& backward, const BackwardWalk<T>& of_head, int i)
      : args(backward),
        walk(of_head),
        s(of_head.s),
        m(of_head.m),
        part(of_head.chunk(i)),
        proj(backward.in.proj, part),
        d_out(backward.d_out, part),
        d_proj(backward.d_proj, part) {}

  __device__ float2 z_and_out(int t, int p) const {
    const int at = walk.h * static_cast<int>(s.P) + p;
    return {to_float(proj.at(t)[s.z() + at]), to_float(d_out.at(t)[at])};
  }
  __device__ Gate gate(int r, int p, float y, const float2& z_out) const {
    return gate_of(s, walk.w, walk.h, r, p, y, 1, z_out.x, z_out.y);
  }

  __device__ void load_state(const float* state) const {
    for (int i = static_cast<int>(threadIdx.x); i < m.P * m.ldN / 4; i += kThreads) {
      reinterpret_cast<float4*>(m.state)[i] = reinterpret_cast<const float4*>(state)[i];
    }
  }

  // d_y of the rows.
  __device__ void load_gradients() const {
    const int P = static_cast<int>(s.P), R = static_cast<int>(s.R);
    load_ahead<kThreads>(
        static_cast<int>(threadIdx.x), (kWalkRows + R - 1) / R * P,
        [&](int i) {
          return i / P < part.tokens ? z_and_out(i / P, i % P) : float2{0, 0};
        },
        [&](int i, const float2& z_out) {
          const int row = i / P * R, p = i % P;
          for (int r = 0; r < min(R, kWalkRows - row); ++r) {
            const Gate g = gate(r, p, 0, z_out);
            m.d_y[(row + r) * m.ldP + p] = g.d_gated * g.silu;
          }
        });
  }

  // exp(c_t) d_y. Returns this thread's part of the gradient of D.
  __device__ float scale_gradients() const {
    float sum = 0;
    for (int i = static_cast<int>(threadIdx.x); i < kWalkRows * m.P; i += kThreads) {
      const int row = i / m.P, at = row * m.ldP + i % m.P;
      m.scaled[at] = m.from_start[row] * m.d_y[at];
      sum = fmaf(m.d_y[at], m.v[at], sum);
    }
    return sum;
  }

  // Phase 3: scores and d_weights to the places of weights and d_scores.
  __device__ void scores_backward() const {
    constexpr int kSize = WalkTile::kSize, kStride = kWalkRows + 1;
    WalkTurn<kThreads> turn;
    turn.spread_tiles(kWalkRows, kWalkRows, [&](WalkTile& tile) {
      tile.add_dots(m.q, m.ldN, m.k, m.ldN, m.N);
      tile.each([&](float score, int row, int col) { m.weights[row * kWalkStride + col] = score; });
    });
    // The rows of keys or queries times a state, scaled, to `to`, and their dot products with those
    // of `along`: of what is scaled, or not yet.
    const auto times_state = [&]<bool kScaled>(const float* keys, const float* state,
                                               const float* scale, float* to, const float* along,
                                               float* dots) {
      turn.spread_tiles(kWalkRows, m.P, [&](WalkTile& tile) {
        tile.add_dots(keys, m.ldN, state, m.ldN, m.N);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const int row = tile.row(i);
          float dot = 0;
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const int at = row * m.ldP + tile.col(j);
            const float scaled = scale[row] * tile.sum[i][j];
            to[at] = scaled;
            dot = fmaf(kScaled ? scaled : tile.sum[i][j], along[at], dot);
          }
          dots[tile.col0 * kStride + row] = dot;
        }
      });
    };
    times_state.template operator()<true>(m.q, m.state, m.from_start, m.y, m.d_y, m.q_dots);
    times_state.template operator()<false>(m.k, m.Z, m.to_end, m.d_v, m.v, m.k_dots);
    turn.spread_tiles(kWalkRows, kWalkRows, [&](WalkTile& tile) {
      tile.add_dots(m.d_y, m.ldP, m.v, m.ldP, m.P);
      tile.each([&](float d, int row, int col) { m.d_scores[row * kWalkStride + col] = d; });
    });
  }

  // Phase 4: from there weights and d_scores, and their part in the gradients of gamma, c and
  // scale. A warp has a row, and a lane a column.
  __device__ void weights_backward() const {
    const int col = static_cast<int>(threadIdx.x) % kWarp, R = static_cast<int>(s.R);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, key = col / R;
    float of_column = 0;
#pragma unroll
    for (int row = warp; row < kWalkRows; row += kWarps) {
      const int at = row * kWalkStride + col, t = row / R;
      const float score = m.weights[at], d_weight = m.d_scores[at];
      const float decay = walk.decay_of(row, col), gamma = m.gamma[row], scale = m.scale[col];
      const float factor = key < t ? decay * scale : key == t ? gamma : 0.0f;
      const float weight = factor * score;
      m.weights[at] = weight;
      m.d_scores[at] = factor * d_weight;
      if (key < t) of_column = fmaf(d_weight * decay, score, of_column);
      const float of_gamma = warp_sum(key == t ? d_weight * score : 0.0f);
      const float of_c = warp_sum(key < t ? d_weight * weight : 0.0f);
      if (col == 0) m.row_gamma[row] = of_gamma, m.row_c[row] = of_c;
    }
    m.column_scale[warp * (kWalkRows + 1) + col] = of_column;
  }

  // Phase 5; scaled = exp(c_t) d_y.
  __device__ void rows_backward() const {
    const float D = walk.w.D[walk.h];
    WalkTurn<kThreads> turn;
    turn.tiles(kWalkRows, m.N, [&](WalkTile& tile) {
      tile.add(m.v, m.ldP, m.Z, m.ldN, m.P);
#pragma unroll
      for (int i = 0; i < WalkTile::kSize; ++i) tile.scale_row(i, m.to_end[tile.row(i)]);
      tile.add_transposed(m.d_scores, kWalkStride, m.q, m.ldN, kWalkRows);
      tile.store(m.d_k, m.ldN);
    });
    turn.tiles(kWalkRows, m.N, [&](WalkTile& tile) {
      tile.add(m.scaled, m.ldP, m.state, m.ldN, m.P);
      tile.add(m.d_scores, kWalkStride, m.k, m.ldN, kWalkRows);
      tile.store(m.d_q, m.ldN);
    });
    turn.tiles(kWalkRows, m.P, [&](WalkTile& tile) {
      tile.add(m.weights, kWalkStride, m.v, m.ldP, kWalkRows);
      tile.add_scaled(1, m.y, m.ldP);
      tile.add_scaled(D, m.v, m.ldP);
      tile.store(m.y, m.ldP);
    });
    turn.tiles(kWalkRows, m.P, [&](WalkTile& tile) {
      tile.add_transposed(m.weights, kWalkStride, m.d_y, m.ldP, kWalkRows);
      tile.add_scaled(1, m.d_v, m.ldP);
      tile.add_scaled(D, m.d_y, m.ldP);
      tile.store(m.d_v, m.ldP);
    });
  }

  // Z before the chunk. Returns this thread's part of what the state before it gives to the
  // gradient of c at its end.
  __device__ float state_backward() const {
    const float left = m.decay();
    float along = 0;
    WalkTurn<kThreads> turn;
    turn.tiles(m.P, m.N, [&](WalkTile& tile) {
      tile.each([&](float, int row, int col) {
        along = fmaf(m.Z[row * m.ldN + col], m.state[row * m.ldN + col], along);
      });
      tile.add_transposed(m.scaled, m.ldP, m.q, m.ldN, kWalkRows);
      tile.add_scaled(left, m.Z, m.ldN);
      tile.store(m.Z, m.ldN);
    });
    return left * along;
  }

  // d_q and d_k back through the rotation; the gradient of an angle takes the place of its cosine.
  // A thread turns one pair of every rank.
  __device__ void turn_back() const {
    const int S = static_cast<int>(s.S), R = static_cast<int>(s.R);
    for (int index = static_cast<int>(threadIdx.x); index < part.tokens * S; index += kThreads) {
      const int t = index / S, i = index % S;
      const RotaryPart pair = rotary_part(s, i);
      float* const at_angle = m.cosine + t * m.ldS + i;
      const float cosine = *at_angle, sine = m.sine[t * m.ldS + i];
      float d_angle = 0;
      const auto back = [&](const float* rotated, float* d_rotated) {
        // d rot / d angle of a pair (a, b) is (-b, a).
        const float d_a = d_rotated[pair.a], d_b = d_rotated[pair.b];
        d_angle = fmaf(-d_a, rotated[pair.b], fmaf(d_b, rotated[pair.a], d_angle));
        d_rotated[pair.a] = fmaf(d_a, cosine, d_b * sine);
        d_rotated[pair.b] = fmaf(d_b, cosine, -d_a * sine);
      };
      for (int row = t * R; row < (t + 1) * R; ++row) {
        back(m.k + row * m.ldN, m.d_k + row * m.ldN);
        back(m.q + row * m.ldN, m.d_q + row * m.ldN);
      }
      *at_angle = d_angle;
    }
  }

  // d_z and d_x; what mimo_x, mimo_z and mimo_o get.
  __device__ void inputs_backward() const {
    const MixerWeights& w = walk.w;
    const int P = static_cast<int>(s.P), R = static_cast<int>(s.R);
    load_ahead<kThreads>(
        static_cast<int>(threadIdx.x), kWalkRows / R * P,
        [&](int i) { return z_and_out(min(i / P, part.tokens - 1), i % P); },
        [&](int i, const float2& z_out) {
          const int t = i / P, p = i % P;
          if (t >= part.tokens) return;
          float d_z = 0, d_x = 0;
          for (int r = 0; r < R; ++r) {
            const int at = (t * R + r) * m.ldP + p;
            const Gate g = gate(r, p, m.y[at], z_out);
            d_z = fmaf(g.d_gated * g.weighted * g.d_silu, walk.up(w.mimo_z, r, p), d_z);
            d_x = fmaf(m.d_v[at], walk.up(w.mimo_x, r, p), d_x);
          }
          T* const d_row = d_proj.at(t) + walk.h * P + p;
          d_row[s.z()] = from_float<T>(d_z);
          d_row[s.x()] = from_float<T>(d_x);
        });
    if (!s.mimo) return;
    for (int index = static_cast<int>(threadIdx.x); index < R * P; index += kThreads) {
      const int r = index / P, p = index % P;
      float d_mimo_x = 0, d_mimo_z = 0, d_mimo_o = 0;
      for (int t = 0; t < part.tokens; ++t) {
        const int at = (t * R + r) * m.ldP + p;
        const float2 z_out = z_and_out(t, p);
        const float x = to_float(proj.at(t)[s.x() + walk.h * P + p]);
        const Gate g = gate(r, p, m.y[at], z_out);
        d_mimo_x = fmaf(m.d_v[at], x, d_mimo_x);
        d_mimo_z = fmaf(g.d_gated * g.weighted * g.d_silu, z_out.x, d_mimo_z);
        d_mimo_o = fmaf(z_out.y * g.weighted, g.silu, d_mimo_o);
      }
      m.d_mimo_x[index] += d_mimo_x;
      m.d_mimo_z[index] += d_mimo_z;
      m.d_mimo_o[index] += d_mimo_o;
    }
  }

  // Rows of d_k and d_q to scratch, and what the biases get.
  __device__ void store_rows() const {
    const int R = static_cast<int>(s.R), of_rank = m.N / 4, of_rows = R * of_rank;
    for (int i = static_cast<int>(threadIdx.x); i < part.tokens * 2 * of_rows; i += kThreads) {
      const int t = i / (2 * of_rows), in_token = i % (2 * of_rows);
      const bool is_q = in_token >= of_rows;
      const int row = t * R + in_token % of_rows / of_rank, n = in_token % of_rank * 4;
      reinterpret_cast<float4*>(args.rows.at(part, t, walk.h))[in_token] =
          *reinterpret_cast<const float4*>((is_q ? m.d_q : m.d_k) + row * m.ldN + n);
    }
    if (!s.bc_bias) return;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * R * m.N; i += kThreads) {
      const bool is_q = i >= R * m.N;
      const int index = i % (R * m.N), n = index % m.N;
      const float* d = (is_q ? m.d_q : m.d_k) + index / m.N * m.ldN + n;
      float sum = 0;
      for (int t = 0; t < part.tokens; ++t) sum += d[t * R * m.ldN];
      (is_q ? m.d_C_bias : m.d_B_bias)[index] += sum;
    }
  }

  // A token's angle is in those of all later tokens. What this warp's angles give to dt of each
  // token goes to d_dt.
  __device__ void angles_backward(float (&d_dt)[kWarp]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, R = static_cast<int>(s.R);
    const typename BackwardWalk<T>::AngleLanes lanes(R);
    const int t = lanes.t;
    const bool present = t < part.tokens;
    float* const to = args.rows.at(part, present ? t : 0, walk.h) + 2 * R * m.N;
    float along = 0;
    lanes.each(static_cast<int>(s.S), [&](int i, bool is_angle) {
      const int at = t * m.ldS + i;
      float sum = present && is_angle ? m.cosine[at] : 0.0f;
      for (int distance = lanes.together; distance < kWarp; distance *= 2) {
        const float later = __shfl_down_sync(~0u, sum, distance);
        if (lane + distance < kWarp) sum += later;
      }
      if (is_angle) sum += m.later_angle[i];
      __syncwarp();
      if (is_angle && t == 0) m.later_angle[i] = sum;
      if (present && is_angle) {
        to[i] = m.dt[t * R] * sum;
        along = fmaf(m.theta[at], sum, along);
      }
    });
    for (int distance = 1; distance < lanes.together; distance *= 2) {
      along += __shfl_xor_sync(~0u, along, distance);
    }
    if (lane % lanes.together == 0) d_dt[t] = along;
  }
};

// What the first token of a chunk waits for until the chunk before is done: gradients of gamma,
// and of dt but for what is by way of gamma and scale.
struct Pending {
  float d_gamma, d_rest;
};

// Phase 8, a lane a row: all that enters c and scale; then dd_A of the chunk's tokens, and dd_dt
// and trap of those from the second on and of the first of the chunk after. `at_state` is what the
// state before the chunk gives to c at its end; d_dt is by way of the angles of every warp.
template <typename T>
__device__ void terms_backward(const BackwardChunk<T>& back, float at_state,
                               const float (&d_dt)[kWarps][kWarp], Pending& pending,
                               float& d_dt_bias, float& d_A_log) {
  const Backward<T>& args = back.args;
  const MixerShape& s = back.s;
  const WalkSpace& m = back.m;
  const MixerChunk& part = back.part;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, R = static_cast<int>(s.R);
  const int t = lane / R, h = back.walk.h;
  const auto sum_parts = [&](const float* parts, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += parts[i * (kWalkRows + 1) + lane];
    return sum;
  };
  const float q_dot = sum_parts(m.q_dots, m.P / WalkTile::kSize);
  const float k_dot = sum_parts(m.k_dots, m.P / WalkTile::kSize);
  const float in_weights = sum_parts(m.column_scale, kWarps);
  float d_gamma = m.row_gamma[lane];
  const float decay = expf((m.c[kWarp - 1] - m.c[lane]) + (m.c_low[kWarp - 1] - m.c_low[lane]));
  const float d_to_end = decay * m.scale[lane] * k_dot;
  float d_scale = fmaf(decay, k_dot, in_weights);
  float d_c = m.row_c[lane] - in_weights * m.scale[lane] + q_dot - d_to_end;
  const float end = warp_sum(d_to_end) + at_state;
  // c of a token and of the later ones contain its A dt.
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const float later = __shfl_down_sync(~0u, d_c, distance);
    if (lane + distance < kWarp) d_c += later;
  }
  const float d_A_dt = d_c + end;
  float of_token = d_gamma;
  float scale_of_token = d_scale;
  for (int r = 1; r < R; ++r) {  // the lanes of rank 0 sum over ranks
    of_token += __shfl_down_sync(~0u, d_gamma, r);
    scale_of_token += __shfl_down_sync(~0u, d_scale, r);
  }
  d_gamma = of_token + scale_of_token;  // gamma is in scale
  d_scale = scale_of_token;

  const bool mine = t < part.tokens && lane % R == 0;
  float d_rest = 0;
  if (mine) {
    const T* row = back.proj.at(t);
    const float rate = decay_rate(s, back.walk.w, row, h);
    d_rest = -rate * d_A_dt;
    if (s.has_dd_A()) {
      const float slope = decay_act_derivative(s.decay_act, to_float(row[s.dd_A() + h]));
      const float d_A = rate > s.A_floor ? -slope * m.dt[lane] * d_A_dt : 0.0f;
      back.d_proj.at(t)[s.dd_A() + h] = from_float<T>(d_A);
    } else {
      d_A_log = fmaf(m.dt[lane], d_rest, d_A_log);
    }
    if (s.has_angles()) {
      for (int warp = 0; warp < kWarps; ++warp) d_rest += d_dt[warp][t];
    }
  }
  const auto step = [&](int token, float gamma, float carry, float rest) {
    d_dt_bias += step_backward(s, back.walk.w, back.proj.at(token), back.d_proj.at(token), h, gamma,
                               carry, rest);
  };
  float next_gamma = __shfl_down_sync(~0u, d_gamma, R);
  float next_rest = __shfl_down_sync(~0u, d_rest, R);
  if (t + 1 == part.tokens) next_gamma = pending.d_gamma, next_rest = pending.d_rest;
  if (mine && (t + 1 < part.tokens || !part.last)) step(t + 1, next_gamma, d_scale, next_rest);
  if (part.first && lane == 0) step(0, d_gamma, 0, d_rest);
  pending = {__shfl_sync(~0u, d_gamma, 0), __shfl_sync(~0u, d_rest, 0)};
}

// A block a head of a sequence.
template <int kN, int kP, int kR, typename T>
__global__ void __launch_bounds__(kThreads, 2) walk_backward(Backward<T> args) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  __shared__ float d_dt[kWarps][kWarp], at_state[kWarps], sums[kWarps];
  const MixerShape s = known_shape<kN, kP, kR>(args.in.s);
  MixerWeights w = known_weights<kR>(args.in.w);
  w.norm = nullptr;
  const WalkSpace m(s, true, reinterpret_cast<float*>(shared));
  const BackwardWalk<T> walk(args.in, s, w, m, blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, h = walk.h;
  const int chunks = walk.chunks(), state_floats = m.P * m.ldN;
  // The chunks of packed sequences before this one are no more than that.
  const int64_t first_chunk = args.in.cu_seqlens ? walk.whole.start / args.in.Q + walk.sequence
                                                 : int64_t{walk.sequence} * chunks;
  const auto state_at = [&](int i) {
    return args.states + ((first_chunk + i) * s.H + h) * state_floats;
  };
  const auto angle_at = [&](int i) { return args.angles + ((first_chunk + i) * s.H + h) * s.S; };
  m.clear();
  if (chunks > 0) {
    for (int i = thread; i < s.S; i += kThreads) angle_at(0)[i] = 0;
  }
  __syncthreads();
  walk.begin_turns();
  __syncthreads();

  for (int i = 0; i < chunks; ++i) {
    for (int j = thread; j < state_floats / 4; j += kThreads) {
      reinterpret_cast<float4*>(state_at(i))[j] = reinterpret_cast<const float4*>(m.state)[j];
    }
    if (i + 1 == chunks) break;
    const MixerChunk part = walk.chunk(i);
    if (warp == 0) walk.load_terms(part);
    walk.load_keys(part, false);
    walk.load_angles(part, angle_at(i), angle_at(i + 1), nullptr);
    walk.load_values(part);
    __syncthreads();
    walk.turn_keys(part, false);
    __syncthreads();
    WalkTurn<kThreads> turn;
    walk.advance_state(turn);
    __syncthreads();
  }

  float d_D = 0, d_dt_bias = 0, d_A_log = 0;  // the last two of the first warp
  Pending pending{};
  for (int i = chunks - 1; i >= 0; --i) {
    const BackwardChunk<T> back(args, walk, i);
    if (warp == 0) walk.load_terms(back.part);
    walk.load_keys(back.part, true);
    walk.load_angles(back.part, angle_at(i), nullptr, m.theta);
    walk.load_values(back.part);
    back.load_gradients();
    back.load_state(state_at(i));  // each thread reads what it wrote
    __syncthreads();
    walk.turn_keys(back.part, true);
    d_D += back.scale_gradients();
    __syncthreads();
    back.scores_backward();
    __syncthreads();
    back.weights_backward();
    __syncthreads();
    back.rows_backward();
    __syncthreads();
    const float along = warp_sum(back.state_backward());
    if (thread % kWarp == 0) at_state[warp] = along;
    back.turn_back();
    back.inputs_backward();
    __syncthreads();
    back.store_rows();
    if (s.has_angles()) back.angles_backward(d_dt[warp]);
    __syncthreads();
    if (warp == 0) {
      float sum = 0;
      for (int j = 0; j < kWarps; ++j) sum += at_state[j];
      terms_backward(back, sum, d_dt, pending, d_dt_bias, d_A_log);
    }
  }

  const ParamOffsets& o = args.params;
  float* const partial = args.partial + walk.sequence * o.B_norm;
  const int N = static_cast<int>(s.N), P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  __syncthreads();
  d_D = block_sum(d_D, sums);
  if (thread == 0) partial[o.D + h] = d_D;
  if (warp == 0) {
    d_dt_bias = warp_sum(d_dt_bias);
    d_A_log = warp_sum(d_A_log);
    if (thread == 0) {
      partial[o.dt_bias + h] = d_dt_bias;
      if (!s.has_dd_A()) partial[o.A_log + h] = d_A_log;
    }
  }
  for (int i = thread; s.bc_bias && i < R * N; i += kThreads) {
    const int from = i / N * m.N + i % N;
    partial[o.B_bias + h * R * N + i] = m.d_B_bias[from];
    partial[o.C_bias + h * R * N + i] = m.d_C_bias[from];
  }
  for (int i = thread; s.mimo && i < R * P; i += kThreads) {
    partial[o.mimo_x + h * R * P + i] = m.d_mimo_x[i];
    partial[o.mimo_z + h * R * P + i] = m.d_mimo_z[i];
    partial[o.mimo_o + h * R * P + i] = m.d_mimo_o[i];
  }
}

// B, C and the raw angles of kHeadTokens tokens: sums over the heads, then back through the norm,
// and theta = pi tanh(angle), so d theta / d angle = pi - theta^2 / pi. Half of the warps take rows
// of B, the others of C; a lane has four channels, and a warp as many rows as it has lanes for.
// What the rows give to the weights of the norms is a row of d_norms (blocks, 2, N).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    heads_backward(Backward<T> args, int tokens, float* d_norms) {
  constexpr int kFour = 4;
  __shared__ float sums[2][kThreads / 2][kFour];
  const MixerShape& s = args.in.s;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int N = static_cast<int>(s.N), R = static_cast<int>(s.R), G = static_cast<int>(s.G);
  const int H = static_cast<int>(s.H), S = static_cast<int>(s.S), group = H / G;
  const int fours = (N + 3) / kFour;
  int width = 1;  // lanes of a row: a power of two
  while (width < fours) width *= 2;
  const int rows_at_once = kThreads / 2 / width;
  const bool is_C = thread >= kThreads / 2;
  const int turn = thread % (kThreads / 2) / width, n0 = lane % width * kFour;
  const int first = static_cast<int>(blockIdx.x) * kHeadTokens;
  const int mine = min(kHeadTokens, tokens - first);
  const auto token_at = [&](int t) {
    return MixerChunk{.batch = (first + t) / args.in.T_max,
                      .start = (first + t) % args.in.T_max,
                      .tokens = 1,
                      .sequence = 0,
                      .first = false,
                      .last = false};
  };
  const auto sum_of_row = [&](float value) {
    for (int distance = 1; distance < width; distance *= 2) {
      value += __shfl_xor_sync(~0u, value, distance);
    }
    return value;
  };
  const float* weight = is_C ? args.in.w.C_norm : args.in.w.B_norm;
  float d_weight[kFour] = {};
  // All lanes of a warp go on together.
  for (int u = turn; u - turn < mine * R * G; u += rows_at_once) {
    const bool is_row = u < mine * R * G && n0 < N;
    const int t = is_row ? u / (R * G) : 0, i = is_row ? u % (R * G) : 0;
    const MixerChunk token = token_at(t);
    const int64_t column = (is_C ? s.C() : s.B()) + i * N + n0;
    const T* raw = args.in.proj.at(token, 0) + column;
    const float* row =
        args.rows.at(token, 0, i % G * group) + ((is_C ? R : 0) + i / G) * fours * kFour + n0;
    float x[kFour] = {}, sum[kFour] = {}, squares = 0, mean = 0;
    if (is_row) {
#pragma unroll 4
      for (int h = 0; h < group; ++h) {
        const float4 of_head = *reinterpret_cast<const float4*>(row + h * args.rows.size);
        sum[0] += of_head.x, sum[1] += of_head.y, sum[2] += of_head.z, sum[3] += of_head.w;
      }
#pragma unroll
      for (int j = 0; j < kFour; ++j) x[j] = n0 + j < N ? to_float(raw[j]) : 0.0f;
    }
    float rstd = 1;
    if (s.bc_norm) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) squares = fmaf(x[j], x[j], squares);
      rstd = rsqrtf(sum_of_row(squares) / static_cast<float>(N) + s.eps);
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        x[j] *= rstd;
        d_weight[j] = fmaf(sum[j], x[j], d_weight[j]);
        if (n0 + j < N) sum[j] *= weight[n0 + j];
        mean = fmaf(sum[j], x[j], mean);
      }
      mean = sum_of_row(mean) / static_cast<float>(N);
    }
    T* d_raw = args.d_proj.at(token, 0) + column;
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      if (is_row && n0 + j < N) d_raw[j] = from_float<T>(fmaf(-x[j], mean, sum[j]) * rstd);
    }
  }
  for (int i = thread; s.has_angles() && i < mine * S; i += kThreads) {
    const MixerChunk token = token_at(i / S);
    const float* row = args.rows.at(token, 0, 0) + 2 * R * fours * kFour + i % S;
    float sum = 0;
#pragma unroll 4
    for (int h = 0; h < H; ++h) sum += row[h * args.rows.size];
    const float theta = theta_of(s, args.in.proj.at(token, 0), i % S);
    args.d_proj.at(token, 0)[s.angle() + i % S] =
        from_float<T>(sum * fmaf(-theta / kPi, theta, kPi));
  }
  if (!s.bc_norm) return;
#pragma unroll
  for (int j = 0; j < kFour; ++j) sums[is_C][thread % (kThreads / 2)][j] = d_weight[j];
  __syncthreads();
  for (int i = thread; i < 2 * N; i += kThreads) {
    const int n = i % N;
    float sum = 0;
    for (int j = 0; j < rows_at_once; ++j) sum += sums[i / N][j * width + n / kFour][n % kFour];
    d_norms[int64_t{blockIdx.x} * 2 * N + i] = sum;
  }
}

// The sequences of a call, or some of a batch.
template <typename T>
void backward_of(Context& ctx, const MixerScanBackwardArgs& args, const View& proj, const View& d_y,
                 const View& d_proj, int64_t sequences, ScratchScope& scope) {
  const MixerShape& s = args.shape;
  const WalkInputs<T> in = walk_inputs<T>(s, args.params, proj, args.cu_seqlens, args.chunk);
  const WalkSpace space(s, true, nullptr);
  const ParamOffsets params(s);
  const int64_t batch = proj.dim(0), length = proj.dim(1), tokens = batch * length;
  const int64_t chunks = args.cu_seqlens.empty() ? sequences * ((length + in.Q - 1) / in.Q)
                                                 : length / in.Q + sequences;
  const int64_t row = (2 * s.R * space.N + s.S + 3) / 4 * 4;
  const int64_t blocks = (tokens + kHeadTokens - 1) / kHeadTokens;
  const auto take = [&](int64_t n) { return scope.take<float>(n).data(); };
  const Backward<T> backward{.in = in,
                             .d_out = MixerRows<const T>(d_y),
                             .d_proj = MixerRows<T>(d_proj),
                             .params = params,
                             .rows = {take(tokens * s.H * row), row, s.H, length},
                             .states = take(chunks * s.H * space.P * space.ldN),
                             .angles = scope.take<double>(chunks * s.H * s.S).data(),
                             .partial = take(sequences * params.B_norm)};
  float* const d_norms = take(blocks * (params.end - params.B_norm));
  visit_known(s, [&]<int kN, int kP, int kR>() {
    launch(ctx, kOp, walk_backward<kN, kP, kR, T>,
           {.blocks = {static_cast<unsigned>(sequences * s.H)},
            .threads = {kThreads},
            .shared_bytes = static_cast<size_t>(space.bytes())},
           backward);
  });
  launch(ctx, kOp, heads_backward<T>,
         {.blocks = {static_cast<unsigned>(blocks)}, .threads = {kThreads}}, backward, tokens,
         d_norms);
  const MixerWeights totals(args.d_params);
  add_params(ctx, kOp, backward.partial, sequences, nullptr, params, 0, params.B_norm, totals);
  add_params(ctx, kOp, d_norms, blocks, nullptr, params, params.B_norm, params.end, totals);
}

}  // namespace

void mixer_scan_backward_walk(Context& ctx, const MixerScanBackwardArgs& args, int64_t sequences,
                              int64_t size) {
  const bool packed = !args.cu_seqlens.empty();
  visit_activation(args.proj.dtype, [&]<typename T>() {
    for (int64_t first = 0; first < sequences; first += size) {
      const int64_t end = std::min(first + size, sequences);
      const auto part = [&](const View& view) { return packed ? view : view.slice(0, first, end); };
      ScratchScope scope(ctx.scratch);
      backward_of<T>(ctx, args, part(args.proj), part(args.d_y), part(args.d_proj), end - first,
                     scope);
    }
  });
}

}  // namespace mamba3::cuda
