#pragma once

// A chunk of the gated delta rule on a thread block, for the forward and the backward of
// delta_scan; cpu/delta_chunk-inl.h has the equations and the names.
//
// The schedule: a block takes a head of a sequence and walks its chunks of up to 16 tokens in
// order, the state always at hand. All that it works on is in one space, in shared memory where it
// fits and else in scratch, where the caches serve it. Matrices there have dims that are multiples
// of 4 and zeros in what is added to them, and chunks always have 16 rows, those behind the last
// token zero: so no product has an edge. Between phases the block waits. A phase is one of
// - products as tiles of walk_tile.cuh. Keys and queries, and what follows from them, lie one below
//   the other, so that a phase makes one product of both. Products with 16 columns are too few
//   tiles: lanes share these (delta_dots).
// - the triangular systems, and what is added to a column before or after: a thread has a column in
//   its registers.
// - sums over rows: eight lanes have a row (DeltaRow), so that all rows are summed at once.

#include "cuda/mixer.cuh"
#include "cuda/walk_tile.cuh"
#include "ops/delta.h"

namespace mamba3::cuda {

inline constexpr int kDeltaThreads = 128, kDeltaWarps = kDeltaThreads / kWarp;
inline constexpr int kDeltaRows = 16;    // of a chunk
inline constexpr int kDeltaStride = 20;  // of matrices (kDeltaRows, kDeltaRows)

using DeltaTurn = WalkTurn<kDeltaThreads>;

// The parameters, or their gradients.
struct DeltaWeights {
  float *A_log, *dt_bias, *norm;

  DeltaWeights() = default;
  explicit DeltaWeights(const DeltaParams& p)
      : A_log(data<float>(p.A_log)), dt_bias(data<float>(p.dt_bias)), norm(data<float>(p.norm)) {}
};

// Tokens [start, start + tokens) of row `batch` of the views (B, T, ..).
struct DeltaSequence {
  int64_t batch, start;
  int tokens;

  __device__ DeltaSequence(const int32_t* cu_seqlens, int64_t i, int64_t T)
      : batch(cu_seqlens ? 0 : i),
        start(cu_seqlens ? cu_seqlens[i] : 0),
        tokens(static_cast<int>(cu_seqlens ? cu_seqlens[i + 1] - cu_seqlens[i] : T)) {}
};

// The rows of a view (B, T, columns).
template <typename T>
struct DeltaTokens {
  T* data;
  int64_t batch_stride, token_stride;

  explicit DeltaTokens(const View& view)
      : data(cuda::data<T>(view)), batch_stride(view.stride(0)), token_stride(view.stride(1)) {}
  __device__ T* at(const DeltaSequence& sequence, int64_t t) const {
    return data + sequence.batch * batch_stride + (sequence.start + t) * token_stride;
  }
};

// A row of a chunk and the lanes that share it. The rows of a warp are two apart, so that lanes
// which read neighbours of their rows meet no other in its bank.
struct DeltaRow {
  static constexpr int kLanes = kDeltaThreads / kDeltaRows;
  int t, lane;

  __device__ DeltaRow() {
    constexpr int kOfWarp = kWarp / kLanes;
    const unsigned thread = threadIdx.x, warp = thread / kWarp;
    t = static_cast<int>(warp / 2 * (2 * kOfWarp) + warp % 2 + thread % kWarp / kLanes * 2);
    lane = static_cast<int>(thread % kLanes);
  }
  // load_ahead() of this lane's share of i < count.
  template <typename Load, typename Use>
  __device__ void each(int count, const Load& load, const Use& use) const {
    load_ahead<kLanes, 8>(lane, count, load, use);
  }
  // Over the lanes of the row.
  __device__ static float sum(float value) {
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      value += __shfl_xor_sync(~0u, value, apart);
    }
    return value;
  }
};

// A B^T for A (kRows, inner) and B (kDeltaRows, inner), by the last 4 kRows threads: four lanes
// have a tile, each every fourth step of the sum, and then a row of it. Calls body(dots, row,
// tile), where the columns of dots are those of the tile.
template <int kRows, typename Body>
__device__ void delta_dots(const float* a, int lda, const float* b, int ldb, int inner,
                           const Body& body) {
  constexpr int kSize = WalkTile::kSize, kParts = 4, kTiles = kWarp / kParts;
  constexpr int kDown = kRows / kSize, kAcross = kDeltaRows / kSize;
  const int warp = kDeltaWarps - 1 - static_cast<int>(threadIdx.x / kWarp);
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (warp * kTiles >= kDown * kAcross) return;
  const int i = warp * kTiles + lane % kTiles, part = lane / kTiles;
  WalkTile tile(i % kDown, i / kDown, kDown, kAcross);
  for (int k = kSize * part; k < inner; k += kSize * kParts) {
    tile.add_dots(a + k, lda, b + k, ldb, kSize);
  }
  // A lane gives away the half of the rows that is not its own, then one of two rows.
  const bool low = part >= 2, odd = part % 2 == 1;
  float half[2][kSize], dots[kSize];
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float upper = tile.sum[row][j], lower = tile.sum[row + 2][j];
      half[row][j] = (low ? lower : upper) + __shfl_xor_sync(~0u, low ? upper : lower, 2 * kTiles);
    }
    dots[j] = (odd ? half[1][j] : half[0][j]) +
              __shfl_xor_sync(~0u, odd ? half[0][j] : half[1][j], kTiles);
  }
  body(dots, tile.row(part), tile);
}

// What a block works on.
struct DeltaSpace {
  int K, V;      // multiples of 4
  int ld;        // of the matrices of K or V columns: an odd multiple of 4, for the banks
  int floats;    // that all take
  float* kq;     // (2 kDeltaRows, K) k, then q
  float* s_kq;   // (2 kDeltaRows, V) exp(c_t) S k_t, then exp(c_t) S q_t
  float* v;      // (kDeltaRows, V)
  float* state;  // (V, K) before the chunk
  float* a;      // (kDeltaRows, kDeltaRows)
  float* p;      // the same, below a
  float *beta, *g, *c, *c_low, *from_start, *to_end;  // (kDeltaRows) g: log alpha
  float* rstd;                                        // (2 kDeltaRows) of k, then of q
  // Of the backward, gradients by their names. There `state` is not the state all the time.
  float* d_o;                    // (kDeltaRows, V), and below it is v
  float* d_k;                    // (kDeltaRows, K)
  float* u;                      // (kDeltaRows, V), below d_k
  float *d_beta, *d_c, *at_end;  // (kDeltaRows)
  float* row_sums;     // (kDeltaWarps, kDeltaRows) what a and p give to d_c, parts of rows
  float* column_sums;  // (kDeltaRows)
  float* norm;         // (V)
  float* d_norm;       // (kDeltaWarps, V)

  // With a null base it only counts. Without a state of its own it has none.
  __host__ __device__ DeltaSpace(const DeltaShape& s, bool backward, bool own_state, float* base) {
    K = static_cast<int>(s.K + 3) / 4 * 4;
    V = static_cast<int>(s.V + 3) / 4 * 4;
    ld = (K > V ? K : V) + 4;
    if (ld % 8 == 0) ld += 4;
    floats = 0;
    const auto take = [&](int n) {
      float* const at = base ? base + floats : nullptr;
      floats += n;
      return at;
    };
    constexpr int kRows = kDeltaRows, kSquare = kDeltaRows * kDeltaStride;
    kq = take(2 * kRows * ld);
    s_kq = take(2 * kRows * ld);
    d_o = backward ? take(kRows * ld) : nullptr;
    v = take(kRows * ld);
    state = own_state ? take(V * ld) : nullptr;
    a = take(kSquare);
    p = take(kSquare);
    beta = take(kRows), g = take(kRows), c = take(kRows), c_low = take(kRows);
    from_start = take(kRows), to_end = take(kRows), rstd = take(2 * kRows);
    if (!backward) return;
    d_k = take(kRows * ld);
    u = take(kRows * ld);
    d_beta = take(kRows), d_c = take(kRows), at_end = take(kRows);
    row_sums = take(kDeltaWarps * kRows), column_sums = take(kRows);
    norm = take(V);
    d_norm = take(kDeltaWarps * V);
  }

  __device__ float* q() const { return kq + kDeltaRows * ld; }
  __device__ float* s_q() const { return s_kq + kDeltaRows * ld; }
  // exp(c_i - c_j) for j <= i.
  __device__ float decay(int i, int j) const {
    return expf(fminf(0.0f, (c[i] - c[j]) + (c_low[i] - c_low[j])));
  }

  // The state of the pool (V, K), or zero without one.
  __device__ void begin_state(const DeltaShape& s, const float* pool) const {
    for (int i = static_cast<int>(threadIdx.x); i < V * ld; i += kDeltaThreads) {
      const int row = i / ld, col = i % ld;
      state[i] = pool && row < s.V && col < s.K ? pool[row * s.K + col] : 0.0f;
    }
  }

  // Keys, values, decays and, if wanted, queries of `tokens` tokens from `first` on.
  template <bool kWithQ, typename T>
  __device__ void load_chunk(const DeltaShape& s, const DeltaWeights& w,
                             const DeltaTokens<const T>& proj, const DeltaSequence& sequence,
                             int first, int tokens, int h) const {
    const DeltaRow row;
    // All that is loaded is asked for before the first sum.
    const int lane = static_cast<int>(threadIdx.x);  // of the first warp, which has the decays
    const bool is_token = lane < tokens;
    T raw_a{}, raw_b{};
    float bias = 0, A_log = 0;
    if (is_token) {
      const T* const from = proj.at(sequence, first + lane);
      raw_a = from[s.a() + h];
      raw_b = from[s.b() + h];
      bias = w.dt_bias[h];
      A_log = w.A_log[h];
    }
    const bool present = row.t < tokens;
    const T* const from = proj.at(sequence, first + (present ? row.t : 0));
    const auto copy = [&](const T* raw, int columns, int padded, float* to) {
      float squares = 0;
      row.each(
          padded, [&](int i) { return present && i < columns ? to_float(raw[i]) : 0.0f; },
          [&](int i, float x) {
            squares = fmaf(x, x, squares);
            to[row.t * ld + i] = x;
          });
      return squares;
    };
    // Each lane scales what it wrote.
    const auto norm = [&](float squares, float factor, float* to, float* of_row) {
      const float scale = 1.0f / sqrtf(DeltaRow::sum(squares) + kDeltaNormEps);
      for (int i = row.lane; i < K; i += DeltaRow::kLanes) to[row.t * ld + i] *= scale * factor;
      if (row.lane == 0) of_row[row.t] = scale;
    };
    const int columns = static_cast<int>(s.K);
    const float of_k = copy(from + s.k() + h * s.K, columns, K, kq);
    const float of_q = kWithQ ? copy(from + s.q() + h * s.K, columns, K, q()) : 0.0f;
    copy(from + s.v() + h * s.V, static_cast<int>(s.V), V, v);
    norm(of_k, 1, kq, rstd);
    if (kWithQ) norm(of_q, 1.0f / sqrtf(static_cast<float>(s.K)), q(), rstd + kDeltaRows);

    if (lane >= kWarp) return;
    const float log_alpha = is_token ? -expf(A_log) * softplus(to_float(raw_a) + bias) : 0.0f;
    double sum = static_cast<double>(log_alpha);
#pragma unroll
    for (int distance = 1; distance < kDeltaRows; distance *= 2) {
      const double before = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += before;
    }
    const double end = __shfl_sync(~0u, sum, kDeltaRows - 1);
    if (lane >= kDeltaRows) return;
    const float high = static_cast<float>(sum);
    beta[lane] = is_token ? (s.negative ? 2.0f : 1.0f) * sigmoid(to_float(raw_b)) : 0.0f;
    g[lane] = log_alpha;
    c[lane] = high;
    c_low[lane] = static_cast<float>(sum - static_cast<double>(high));
    from_start[lane] = expf(high);
    to_end[lane] = expf(static_cast<float>(end - sum));
  }

  // a, and the keys' part of s_kq; if wanted p, and that of the queries. The state has rows of ldS.
  template <bool kWithQ>
  __device__ void weights(const float* S, int ldS) const {
    constexpr int kRows = (kWithQ ? 2 : 1) * kDeltaRows;
    delta_dots<kRows>(kq, ld, kq, ld, K, [&](const auto& dots, int row, const WalkTile& tile) {
      const int t = row % kDeltaRows;
      const bool is_q = row >= kDeltaRows;
      float* const to = (is_q ? p : a) + t * kDeltaStride;
#pragma unroll
      for (int j = 0; j < WalkTile::kSize; ++j) {
        const int col = tile.col(j);
        const bool seen = is_q ? col <= t : col < t;
        const float value = seen ? dots[j] * decay(t, col) : 0.0f;
        to[col] = is_q ? value : -value;
      }
    });
    DeltaTurn turn;
    turn.spread_tiles(kRows, V, [&](WalkTile& tile) {
      tile.add_dots(kq, ld, S, ldS, K);
      tile.each([&](float sum, int row, int col) {
        s_kq[row * ld + col] = from_start[row % kDeltaRows] * sum;
      });
    });
  }

  // u, of which updated(i, column, u_i) is told; then, if wanted, o before norm and gate = s_q + p
  // u, which may take the place of s_q. A thread has whole columns; the last threads come first,
  // for others have more to do in the phase before.
  template <bool kWithOutputs, typename Updated>
  __device__ void solve(const Updated& updated, float* o) const {
    for (int col = kDeltaThreads - 1 - static_cast<int>(threadIdx.x); col < V;
         col += kDeltaThreads) {
      float x[kDeltaRows];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) x[i] = v[i * ld + col] - s_kq[i * ld + col];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) x[i] = beta[i] * add_row(a, i, i, x, x[i]);
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) updated(i, col, x[i]);
      if constexpr (kWithOutputs) {
#pragma unroll
        for (int i = 0; i < kDeltaRows; ++i) {
          o[i * ld + col] = add_row(p, i, i + 1, x, s_q()[i * ld + col]);
        }
      }
    }
  }

  // The state after the chunk, from exp(c_Q - c_t) u_t, which has taken the place of v. It is
  // stored by store(tile).
  template <typename Store>
  __device__ void advance_state(const float* S, int ldS, const Store& store) const {
    const float left = from_start[kDeltaRows - 1];
    DeltaTurn turn;
    turn.tiles(V, K, [&](WalkTile& tile) {
      tile.add_transposed(v, ld, kq, ld, kDeltaRows);
      tile.add_scaled(left, S, ldS);
      store(tile);
    });
  }

  // sum + the first `count` elements of row i of a or p times x.
  __device__ static float add_row(const float* matrix, int i, int count,
                                  const float (&x)[kDeltaRows], float sum) {
#pragma unroll
    for (int j = 0; j < kDeltaRows; j += 4) {
      if (j >= count) break;
      const float4 row = *reinterpret_cast<const float4*>(matrix + i * kDeltaStride + j);
      sum = fmaf(row.x, x[j], sum);
      if (j + 1 < count) sum = fmaf(row.y, x[j + 1], sum);
      if (j + 2 < count) sum = fmaf(row.z, x[j + 2], sum);
      if (j + 3 < count) sum = fmaf(row.w, x[j + 3], sum);
    }
    return sum;
  }
  // x += factor times the first `count` elements of row i of a or p.
  __device__ static void add_row_to(float (&x)[kDeltaRows], float factor, const float* matrix,
                                    int i, int count) {
#pragma unroll
    for (int j = 0; j < kDeltaRows; j += 4) {
      if (j >= count) break;
      const float4 row = *reinterpret_cast<const float4*>(matrix + i * kDeltaStride + j);
      x[j] = fmaf(row.x, factor, x[j]);
      if (j + 1 < count) x[j + 1] = fmaf(row.y, factor, x[j + 1]);
      if (j + 2 < count) x[j + 2] = fmaf(row.z, factor, x[j + 2]);
      if (j + 3 < count) x[j + 3] = fmaf(row.w, factor, x[j + 3]);
    }
  }
};

// The shape with K and V that the compiler knows, if they are not 0: it then knows where all of the
// space is, and how long all loops are.
template <int kK, int kV>
__device__ DeltaShape known_delta_shape(DeltaShape s) {
  if constexpr (kK > 0) s.K = kK, s.V = kV;
  return s;
}

// Where a block of a kernel has its space: in shared memory, or its part of `scratch`. The compiler
// hears that it has one, and how many threads there are.
template <bool kShared>
__device__ float* delta_base(float4* shared, float* scratch, int scratch_floats) {
  float* const base =
      kShared ? reinterpret_cast<float*>(shared) : scratch + int64_t{blockIdx.x} * scratch_floats;
  __builtin_assume(base != nullptr);
  __builtin_assume(threadIdx.x < kDeltaThreads);
  return base;
}

// Calls body.template operator()<kShared, kK, kV>() for a space that is in shared memory or not and
// for K and V if they are common ones, else zeros.
template <typename Body>
void visit_delta(const DeltaShape& s, bool shared, Body&& body) {
  if (!shared) return body.template operator()<false, 0, 0>();
  if (s.K == 64 && s.V == 64) return body.template operator()<true, 64, 64>();
  if (s.K == 64 && s.V == 32) return body.template operator()<true, 64, 32>();
  body.template operator()<true, 0, 0>();
}

// Whether so many floats fit in the shared memory of a block, with some left for sums.
inline bool delta_fits(const Context& ctx, int64_t floats) {
  return static_cast<size_t>(floats) * sizeof(float) + 256 <= ctx.stream->shared_memory;
}

}  // namespace mamba3::cuda
