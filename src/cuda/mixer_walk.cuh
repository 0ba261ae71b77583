#pragma once

// The Mamba-3 scan where there are many heads of many sequences, for the forward and the backward.
//
// The schedule: a block takes a head of a sequence and walks its chunks, with the state and all
// that it works on in shared memory; nothing goes through scratch from kernel to kernel, as in
// mixer_segment.cuh. A chunk has 32 rows (t, r), so where a lane stands for a row a warp has all of
// them, and Q = 32/R tokens. Rows of absent tokens are zero.
//
// Matrices there have dims that are multiples of 4, with zeros in what is added to them: so no
// product has an edge. Products are the tiles of walk_tile.cuh; several of a phase follow each
// other in the turn of the threads. Between phases the block waits.

#include <initializer_list>

#include "cuda/mixer_segment.cuh"
#include "cuda/walk_tile.cuh"
#include "ops/mixer_scan.h"

namespace mamba3::cuda {

inline constexpr int kWalkRows = kWarp;     // of a chunk
inline constexpr int kWalkStride = 36;      // of matrices (kWalkRows, kWalkRows)
inline constexpr int kWalkColumnParts = 8;  // of a column of those: the warps of the backward
inline constexpr int kWalkChannels = 128;   // N at most

// The rows of the tokens of a chunk in a view (B, T, columns).
template <typename T>
struct TokenRows {
  T* first;
  int stride;

  __device__ TokenRows(const MixerRows<T>& rows, const MixerChunk& part)
      : first(rows.at(part, 0)), stride(static_cast<int>(rows.token_stride)) {}
  __device__ T* at(int t) const { return first + static_cast<int64_t>(t) * stride; }
};

// What a block works on: arrays in shared memory.
struct WalkSpace {
  int N, P;              // multiples of 4
  int ldN, ldP;          // of matrices of N and P columns: odd multiples of 4, for the banks
  int ldS;               // of matrices (tokens, S): odd
  int floats;            // that all take
  float *q, *k;          // (kWalkRows, N)
  float* v;              // (kWalkRows, P)
  float* state;          // (P, N) before the chunk
  float* weights;        // (kWalkRows, kWalkRows)
  float* y;              // (kWalkRows, P) before norm and gate
  float *cosine, *sine;  // (tokens, S)
  float* turns;          // (S) what a token adds to the angles under Rope::standard
  float *dt, *gamma, *scale, *c, *c_low;  // (kWalkRows) of the row's token
  float* from_start;                      // (kWalkRows) exp(c)
  float* to_end;                          // (kWalkRows) exp(c at the end - c) scale
  // Of the backward: gradients by their names.
  float *d_q, *d_k;            // (kWalkRows, N)
  float *d_v, *d_y;            // (kWalkRows, P)
  float* scaled;               // (kWalkRows, P) d_y times from_start
  float* d_scores;             // (kWalkRows, kWalkRows)
  float* Z;                    // (P, N) the gradient of the state after the chunk
  float* theta;                // (tokens, S)
  float* later_angle;          // (S) the sum of d_angle over later chunks
  float *row_gamma, *row_c;    // (kWalkRows) sums of gradients over columns
  float* column_scale;         // (kWalkColumnParts, kWalkRows + 1) parts of sums over rows
  float *q_dots, *k_dots;      // (P/4, kWalkRows + 1) parts of dot products of rows
  float *d_B_bias, *d_C_bias;  // (R, N)
  float *d_mimo_x, *d_mimo_z, *d_mimo_o;  // (R, P)

  // With a null base it only counts.
  __host__ __device__ WalkSpace(const MixerShape& s, bool backward, float* base) {
    const auto stride_of = [](int columns) { return columns % 8 == 4 ? columns : columns + 4; };
    N = static_cast<int>(s.N + 3) / 4 * 4;
    P = static_cast<int>(s.P + 3) / 4 * 4;
    ldN = stride_of(N);
    ldP = stride_of(P);
    const int S = static_cast<int>(s.S), R = static_cast<int>(s.R);
    ldS = S | 1;
    floats = 0;
    const auto take = [&](int n) {
      float* const at = base ? base + floats : nullptr;
      floats += (n + 3) / 4 * 4;
      return at;
    };
    constexpr int kRows = kWalkRows, kSquare = kWalkRows * kWalkStride;
    const int angles = S > 0 ? kRows / R * ldS : 0;
    q = take(kRows * ldN);
    k = take(kRows * ldN);
    v = take(kRows * ldP);
    state = take(P * ldN);
    y = take(kRows * ldP);
    dt = take(kRows), gamma = take(kRows), scale = take(kRows);
    c = take(kRows), c_low = take(kRows);
    from_start = take(kRows), to_end = take(kRows);
    if (backward) take_gradients(s, take);
    // Last, so that the places of all else are known where N, P and R are. Only the backward asks
    // for cosines and sines again when there are weights.
    weights = take(backward || 2 * angles < kSquare ? kSquare : 2 * angles);
    cosine = backward ? take(angles) : weights;
    sine = backward ? take(angles) : weights + angles;
    turns = take(S);
    if (!backward) return;
    theta = take(angles);
    later_angle = take(S);
  }

  __host__ __device__ int64_t bytes() const { return int64_t{floats} * 4; }

  __device__ void clear() const {  // q is the first
    for (int i = static_cast<int>(threadIdx.x); i < floats / 4; i += static_cast<int>(blockDim.x)) {
      reinterpret_cast<float4*>(q)[i] = make_float4(0, 0, 0, 0);
    }
  }
  // What is left of the state at the end of the chunk.
  __device__ float decay() const { return from_start[kWalkRows - 1]; }

 private:
  template <typename Take>
  __host__ __device__ void take_gradients(const MixerShape& s, const Take& take) {
    constexpr int kRows = kWalkRows, kSquare = kWalkRows * kWalkStride;
    const int dots = P / WalkTile::kSize * (kWalkRows + 1);
    d_q = take(kRows * ldN);
    d_k = take(kRows * ldN);
    d_v = take(kRows * ldP);
    d_y = take(kRows * ldP);
    scaled = take(kRows * ldP);
    d_scores = take(kSquare);
    Z = take(P * ldN);
    row_gamma = take(kRows), row_c = take(kRows);
    column_scale = take(kWalkColumnParts * (kRows + 1));
    q_dots = take(dots), k_dots = take(dots);
    const int R = static_cast<int>(s.R);
    const int biases = s.bc_bias ? R * N : 0, ups = s.mimo ? R * P : 0;
    d_B_bias = take(biases), d_C_bias = take(biases);
    d_mimo_x = take(ups), d_mimo_z = take(ups), d_mimo_o = take(ups);
  }
};

// The sequences that are walked, of all the same length or packed.
template <typename T>
struct WalkInputs {
  MixerShape s;
  MixerWeights w;
  MixerRows<const T> proj;
  const int32_t* cu_seqlens;  // or null
  int T_max;                  // of the longest sequence, or more
  int Q;                      // tokens of a chunk, at most kWalkRows / R
};

// The head of a sequence that a block walks, and the steps that the forward and the backward share.
// Steps without a barrier inside may share a phase.
template <typename T, int kThreads>
struct Walk {
  static constexpr int kWarps = kThreads / kWarp;

  const WalkInputs<T>& in;
  const MixerShape& s;  // of `in`, with what the compiler knows
  const MixerWeights& w;
  const WalkSpace& m;
  int sequence, h, g;
  MixerChunk whole;  // the sequence, as if it were a chunk

  // Heads of a sequence are next to each other: they read the same B and C.
  __device__ Walk(const WalkInputs<T>& inputs, const MixerShape& shape, const MixerWeights& weights,
                  const WalkSpace& space, int64_t task)
      : in(inputs), s(shape), w(weights), m(space) {
    sequence = static_cast<int>(task / s.H);
    h = static_cast<int>(task % s.H);
    g = h / static_cast<int>(s.H / s.G);
    const int32_t* cu = in.cu_seqlens;
    whole = {.batch = cu ? 0 : sequence,
             .start = cu ? cu[sequence] : 0,
             .tokens = cu ? cu[sequence + 1] - cu[sequence] : in.T_max,
             .sequence = sequence,
             .first = true,
             .last = true};
  }
  __device__ int chunks() const { return (whole.tokens + in.Q - 1) / in.Q; }
  __device__ MixerChunk chunk(int i) const {
    MixerChunk part = whole;
    part.start += i * in.Q;
    part.tokens = min(in.Q, whole.tokens - i * in.Q);
    part.first = i == 0;
    part.last = (i + 1) * in.Q >= whole.tokens;
    return part;
  }
  __device__ float up(const float* weights, int r, int p) const {  // of mimo_x, mimo_z or mimo_o
    return weights ? weights[(h * s.R + r) * s.P + p] : 1.0f;
  }
  __device__ float dt_of(const T* row) const {
    return softplus(to_float(row[s.dd_dt() + h]) + w.dt_bias[h]);
  }

  __device__ void begin_turns() const {
    if (s.rope != Rope::standard) return;
    for (int i = static_cast<int>(threadIdx.x); i < s.S; i += kThreads) {
      m.turns[i] = theta_of<T>(s, nullptr, i);
    }
  }

  // dt, gamma, scale, and the sums c of A dt with what depends on them: by one warp, a lane a row.
  __device__ void load_terms(const MixerChunk& part) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, R = static_cast<int>(s.R);
    const int t = lane / R;
    float dt = 0, gamma = 0, scale = 0, A_dt = 0;
    const TokenRows<const T> rows(in.proj, part);
    if (t < part.tokens) {
      const T* row = rows.at(t);
      dt = dt_of(row);
      gamma = trapezoid(s, row, h) * dt;
      scale = gamma;
      if (t + 1 < part.tokens || !part.last) {
        const T* next = rows.at(t + 1);
        scale += (1 - trapezoid(s, next, h)) * dt_of(next);
      }
      if (lane % R == 0) A_dt = -decay_rate(s, w, row, h) * dt;
    }
    double sum = static_cast<double>(A_dt);
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const double before = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += before;
    }
    const double end = __shfl_sync(~0u, sum, kWarp - 1);
    const float high = static_cast<float>(sum);
    m.dt[lane] = dt;
    m.gamma[lane] = gamma;
    m.scale[lane] = scale;
    m.c[lane] = high;
    m.c_low[lane] = static_cast<float>(sum - static_cast<double>(high));
    m.from_start[lane] = expf(high);
    m.to_end[lane] = expf(static_cast<float>(end - sum)) * scale;
  }

  // Keys and, if wanted, queries before the rotation: a warp a row, four of them at a time. With
  // queries, half of the warps have those.
  __device__ void load_keys(const MixerChunk& part, bool with_q) const {
    constexpr int kAhead = 4, kOfLane = kWalkChannels / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, sharing = with_q ? kWarps / 2 : kWarps;
    const bool is_q = warp >= sharing;
    const int R = static_cast<int>(s.R), G = static_cast<int>(s.G), N = static_cast<int>(s.N);
    const TokenRows<const T> rows(in.proj, part);
    const int64_t column = (is_q ? s.C() : s.B()) + g * N + lane;
    const float* norm = is_q ? w.C_norm : w.B_norm;
    const float* bias = is_q ? w.C_bias : w.B_bias;
    if (bias) bias += h * R * N + lane;
    float* const to = (is_q ? m.q : m.k) + lane;
    float weight[kOfLane];
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      weight[j] = norm && lane + j * kWarp < N ? norm[lane + j * kWarp] : 1.0f;
    }
    for (int first = warp % sharing * kAhead; first < kWalkRows; first += sharing * kAhead) {
      float raw[kAhead][kOfLane];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int t = min((first + u) / R, part.tokens - 1), r = (first + u) % R;
        const T* from = rows.at(t) + column + r * G * N;
#pragma unroll
        for (int j = 0; j < kOfLane; ++j) {
          raw[u][j] = lane + j * kWarp < N ? to_float(from[j * kWarp]) : 0.0f;
        }
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int row = first + u, r = row % R;
        const bool present = row / R < part.tokens;
        float rstd = 1;
        if (s.bc_norm) {
          float squares = 0;
#pragma unroll
          for (int j = 0; j < kOfLane; ++j) squares = fmaf(raw[u][j], raw[u][j], squares);
          rstd = rsqrtf(warp_sum(squares) / static_cast<float>(N) + s.eps);
        }
#pragma unroll
        for (int j = 0; j < kOfLane; ++j) {
          if (lane + j * kWarp >= N) break;
          const float shift = bias ? bias[r * N + j * kWarp] : 0.0f;
          const float value = fmaf(raw[u][j] * rstd, weight[j], shift);
          to[row * m.ldN + j * kWarp] = present ? value : 0.0f;
        }
      }
    }
  }

  // Where a lane stands for an angle of a token: a warp has a power of two of angles, at most R,
  // and the tokens of an angle are as many lanes apart.
  struct AngleLanes {
    int together, t, first, step;

    __device__ explicit AngleLanes(int R) {
      const int lane = static_cast<int>(threadIdx.x) % kWarp;
      together = R >= 8 ? 8 : R >= 4 ? 4 : R >= 2 ? 2 : 1;
      t = lane / together;
      first = static_cast<int>(threadIdx.x) / kWarp * together + lane % together;
      step = kWarps * together;
    }
    // body(i, whether there is such an angle) for those of this lane, by all lanes together.
    template <typename Body>
    __device__ void each(int S, const Body& body) const {
      for (int i = first; i - first % together < S; i += step) body(i, i < S);
    }
  };

  // cos and sin of the angles, which go on from `before`; those after the chunk go to `after`, if
  // any. Sums are f64 and modulo 2 pi, so that the angles of a long sequence are not off by more
  // than those of a short one.
  __device__ void load_angles(const MixerChunk& part, const double* before, double* after,
                              float* theta) const {
    if (s.S == 0) return;
    constexpr double kTurn = 6.283185307179586;
    const AngleLanes lanes(static_cast<int>(s.R));
    const int t = lanes.t, lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool present = t < part.tokens;
    const T* row = TokenRows<const T>(in.proj, part).at(present ? t : 0);
    const float dt = present ? angle_step(s, dt_of(row)) : 0.0f;
    lanes.each(static_cast<int>(s.S), [&](int i, bool is_angle) {
      float turn = 0;
      if (is_angle) turn = s.rope == Rope::data ? theta_of(s, row, i) : m.turns[i];
      double phi = static_cast<double>(turn) * static_cast<double>(dt);
      for (int distance = lanes.together; distance < kWarp; distance *= 2) {
        const double earlier = __shfl_up_sync(~0u, phi, distance);
        if (lane >= distance) phi += earlier;
      }
      if (is_angle) phi += before[i];
      phi = fma(-kTurn, floor(phi * (1 / kTurn)), phi);
      __syncwarp();  // `after` may be `before`
      if (after && is_angle && lane + lanes.together >= kWarp) after[i] = phi;
      if (present && is_angle) {
        const int at = t * m.ldS + i;
        float sine, cosine;  // of half a turn less, where floats are denser
        sincospif(static_cast<float>(phi * (2 / kTurn) - 1), &sine, &cosine);
        m.sine[at] = -sine;
        m.cosine[at] = -cosine;
        if (theta) theta[at] = turn;
      }
    });
  }

  __device__ void load_values(const MixerChunk& part) const {
    const int P = static_cast<int>(s.P), R = static_cast<int>(s.R);
    const TokenRows<const T> rows(in.proj, part);
    const int64_t column = s.x() + h * P;
    load_ahead<kThreads>(
        static_cast<int>(threadIdx.x), (kWalkRows + R - 1) / R * P,
        [&](int i) { return to_float(rows.at(min(i / P, part.tokens - 1))[column + i % P]); },
        [&](int i, float x) {
          const int t = i / P, p = i % P;
          if (t >= part.tokens) x = 0;
          for (int r = 0; r < min(R, kWalkRows - t * R); ++r) {
            m.v[(t * R + r) * m.ldP + p] = x * up(w.mimo_x, r, p);
          }
        });
  }

  // Turns keys and, if wanted, queries: a thread turns one pair of every rank.
  __device__ void turn_keys(const MixerChunk& part, bool with_q) const {
    const int S = static_cast<int>(s.S), R = static_cast<int>(s.R);
    for (int index = static_cast<int>(threadIdx.x); index < part.tokens * S; index += kThreads) {
      const int t = index / S, i = index % S;
      const RotaryPart pair = rotary_part(s, i);
      const float cosine = m.cosine[t * m.ldS + i], sine = m.sine[t * m.ldS + i];
      const auto turn = [&](float* row) {
        const float a = row[pair.a], b = row[pair.b];
        row[pair.a] = a * cosine - b * sine;
        row[pair.b] = a * sine + b * cosine;
      };
      for (int row = t * R; row < (t + 1) * R; ++row) {
        turn(m.k + row * m.ldN);
        if (with_q) turn(m.q + row * m.ldN);
      }
    }
  }

  // W of a score q_i k_j is score * weight_of(i, j).
  __device__ float weight_of(int row, int column) const {
    const int R = static_cast<int>(s.R), t = row / R, key = column / R;
    if (key > t) return 0;
    if (key == t) return m.gamma[row];
    return decay_of(row, column) * m.scale[column];
  }
  // exp(c_i - c_j) for j before i.
  __device__ float decay_of(int row, int column) const {
    return expf(fminf(0.0f, (m.c[row] - m.c[column]) + (m.c_low[row] - m.c_low[column])));
  }

  // The state after the chunk.
  __device__ void advance_state(WalkTurn<kThreads>& turn) const {
    const float left = m.decay();
    turn.tiles(m.P, m.N, [&](WalkTile& tile) {
      tile.add_transposed(m.v, m.ldP, m.to_end, m.k, m.ldN, kWalkRows);
      tile.add_scaled(left, m.state, m.ldN);
      tile.store(m.state, m.ldN);
    });
  }
};

// The shape and the weights with sizes that the compiler may know: it then knows where all of the
// space is, and that SISO has no mimo_x, mimo_z and mimo_o.
template <int kN, int kP, int kR>
__device__ MixerShape known_shape(MixerShape s) {
  if constexpr (kN > 0) s.N = kN, s.P = kP, s.R = kR, s.mimo = kR > 1;
  return s;
}
template <int kR>
__device__ MixerWeights known_weights(MixerWeights w) {
  if constexpr (kR == 1) w.mimo_x = w.mimo_z = w.mimo_o = nullptr;
  return w;
}
// Calls body.template operator()<kN, kP, kR>() with the sizes of a shape if they are among the
// common ones, else with zeros.
template <typename Body>
void visit_known(const MixerShape& s, Body&& body) {
  const bool common = s.N == 64 && s.P == 32;
  if (common && s.R == 1 && !s.mimo) return body.template operator()<64, 32, 1>();
  if (common && s.R == 4) return body.template operator()<64, 32, 4>();
  body.template operator()<0, 0, 0>();
}

// What the launches of a call have in common.
template <typename T>
WalkInputs<T> walk_inputs(const MixerShape& s, const MixerParams& params, const View& proj,
                          const View& cu_seqlens, int64_t chunk) {
  return {.s = s,
          .w = MixerWeights(params),
          .proj = MixerRows<const T>(proj),
          .cu_seqlens = data<int32_t>(cu_seqlens),
          .T_max = static_cast<int>(proj.dim(1)),
          .Q = static_cast<int>(mixer_scan_walk_chunk(s.R, chunk))};
}

// Whether mixer_scan_walks(), on this GPU; `views` (B, T, ..) are what it would read and write.
bool walks(const Context& ctx, const MixerShape& shape, MixerSchedule schedule, int64_t sequences,
           std::initializer_list<View> views, bool backward);
// The ops where it does; the backward neither with out_norm nor with states, and `size` sequences
// (mixer_scan_walk_batch()) at a time.
void mixer_scan_walk(Context& ctx, const MixerScanArgs& args, int64_t sequences);
void mixer_scan_backward_walk(Context& ctx, const MixerScanBackwardArgs& args, int64_t sequences,
                              int64_t size);

}  // namespace mamba3::cuda
