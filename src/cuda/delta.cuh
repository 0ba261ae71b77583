#pragma once

// A chunk of the gated delta rule on a thread block, for the forward and the backward of
// delta_scan; cpu/delta_chunk-inl.h has the equations and the names.
//
// The schedule: a block takes a head of a sequence and walks its chunks of up to 16 tokens in
// order, the state always at hand. All that it works on is in one space, in shared memory where it
// fits and else in scratch, where the caches serve it. Matrices there have dims that are multiples
// of 4 and zeros in what is added to them, and chunks always have 16 rows, those behind the last
// token zero: so no product has an edge. A product is cut into tiles of 2 x 4 elements, which
// threads take in turn; between phases the block waits. Keys and queries, and what follows from
// them, lie one below the other, so that a phase makes one product of both.

#include "cuda/mixer.cuh"
#include "ops/delta.h"

namespace mamba3::cuda {

inline constexpr int kDeltaThreads = 128, kDeltaWarps = kDeltaThreads / kWarp;
inline constexpr int kDeltaRows = 16;    // of a chunk
inline constexpr int kDeltaStride = 20;  // of matrices (kDeltaRows, kDeltaRows)

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

// 2 x 4 elements of a product (rows, columns): rows from `row` on, columns col + j step, so that
// the threads of a warp read neighbours.
struct DeltaTile {
  static constexpr int kRows = 2, kCols = 4;
  int row, col, step;
  float sum[kRows][kCols] = {};

  __device__ DeltaTile(int row_, int col_, int step_) : row(row_), col(col_), step(step_) {}
  __device__ int column(int j) const { return col + j * step; }

  // += A B for A (rows, inner), B (inner, columns).
  __device__ void add(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row * lda;
    b += col;
    for (int k = 0; k < inner; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a + k);
      const float4 a1 = *reinterpret_cast<const float4*>(a + lda + k);
      add_outer(a0.x, a1.x, b + (k + 0) * ldb, step);
      add_outer(a0.y, a1.y, b + (k + 1) * ldb, step);
      add_outer(a0.z, a1.z, b + (k + 2) * ldb, step);
      add_outer(a0.w, a1.w, b + (k + 3) * ldb, step);
    }
  }
  // += A^T B for A (inner, rows), B (inner, columns).
  __device__ void add_transposed(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row;
    b += col;
#pragma unroll 4
    for (int k = 0; k < inner; ++k) add_outer(a[k * lda], a[k * lda + 1], b + k * ldb, step);
  }
  // += A B^T for A (rows, inner), B (columns, inner).
  __device__ void add_dots(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row * lda;
    b += col * ldb;
#pragma unroll 2
    for (int k = 0; k < inner; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a + k);
      const float4 a1 = *reinterpret_cast<const float4*>(a + lda + k);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const float4 b_j = *reinterpret_cast<const float4*>(b + j * step * ldb + k);
        sum[0][j] = dot(a0, b_j, sum[0][j]);
        sum[1][j] = dot(a1, b_j, sum[1][j]);
      }
    }
  }
  // Row i times factor.
  __device__ void scale(int i, float factor) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) sum[i][j] *= factor;
  }
  // body(i, j, row, column) for the elements.
  template <typename Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCols; ++j) body(i, j, row + i, column(j));
    }
  }

 private:
  __device__ static float dot(const float4& a, const float4& b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }
  __device__ void add_outer(float a0, float a1, const float* b, int stride) {
#pragma unroll
    for (int j = 0; j < kCols; ++j) {
      const float b_j = b[j * stride];
      sum[0][j] = fmaf(a0, b_j, sum[0][j]);
      sum[1][j] = fmaf(a1, b_j, sum[1][j]);
    }
  }
};

// Calls body(tile) for this thread's tiles of a product (rows, columns).
template <typename Body>
__device__ void for_delta_tiles(int rows, int columns, const Body& body) {
  const int across = columns / DeltaTile::kCols, tiles = rows / DeltaTile::kRows * across;
  for (int i = static_cast<int>(threadIdx.x); i < tiles; i += kDeltaThreads) {
    DeltaTile tile(i / across * DeltaTile::kRows, i % across, across);
    body(tile);
  }
}

// What a block works on.
struct DeltaSpace {
  int K, V;      // multiples of 4
  int ld;        // of the matrices of K or V columns: an odd multiple of 4, for the banks
  int floats;    // that all take
  float* kq;     // (2 kDeltaRows, K) k, then q
  float* v;      // (kDeltaRows, V)
  float* s_kq;   // (2 kDeltaRows, V) exp(c_t) S k_t, then exp(c_t) S q_t
  float* u;      // (kDeltaRows, V)
  float* state;  // (V, K) before the chunk
  float* a;      // (kDeltaRows, kDeltaRows)
  float* p;      // the same, below a
  float *beta, *g, *c, *c_low, *from_start, *to_end;  // (kDeltaRows) g: log alpha
  float* rstd;                                        // (2 kDeltaRows) of k, then of q
  // Of the backward: gradients by their names.
  float *d_o, *d_r;              // (kDeltaRows, V)
  float* Z;                      // (V, K) the gradient of the state after the chunk
  float *d_a, *d_p;              // as a and p
  float *d_beta, *d_c, *at_end;  // (kDeltaRows)
  float* d_norm;                 // (kDeltaWarps, V)

  // With a null base it only counts.
  __host__ __device__ DeltaSpace(const DeltaShape& s, bool backward, float* base) {
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
    v = take(kRows * ld);
    s_kq = take(2 * kRows * ld);
    u = take(kRows * ld);
    state = take(V * ld);
    a = take(kSquare);
    p = take(kSquare);
    beta = take(kRows), g = take(kRows), c = take(kRows), c_low = take(kRows);
    from_start = take(kRows), to_end = take(kRows), rstd = take(2 * kRows);
    if (!backward) return;
    d_o = take(kRows * ld);
    d_r = take(kRows * ld);
    Z = take(V * ld);
    d_a = take(kSquare);
    d_p = take(kSquare);
    d_beta = take(kRows), d_c = take(kRows), at_end = take(kRows);
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
  template <typename T>
  __device__ void load_chunk(const DeltaShape& s, const DeltaWeights& w,
                             const DeltaTokens<const T>& proj, const DeltaSequence& sequence,
                             int first, int tokens, int h, bool with_q) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int row = warp; row < (with_q ? 2 : 1) * kDeltaRows; row += kDeltaWarps) {
      const int t = row % kDeltaRows;
      const bool is_q = row >= kDeltaRows;
      const int n = t < tokens ? static_cast<int>(s.K) : 0;
      const T* const from =
          proj.at(sequence, first + (n ? t : 0)) + (is_q ? s.q() : s.k()) + h * s.K;
      float squares = 0;
      for (int i = lane; i < n; i += kWarp) {
        const float x = to_float(from[i]);
        squares = fmaf(x, x, squares);
      }
      const float scale = 1.0f / sqrtf(warp_sum(squares) + kDeltaNormEps);
      const float factor = is_q ? scale / sqrtf(static_cast<float>(s.K)) : scale;
      for (int i = lane; i < K; i += kWarp) {
        kq[row * ld + i] = i < n ? to_float(from[i]) * factor : 0.0f;
      }
      if (lane == 0) rstd[row] = scale;
    }
    for (int t = warp; t < kDeltaRows; t += kDeltaWarps) {
      const int n = t < tokens ? static_cast<int>(s.V) : 0;
      const T* const from = proj.at(sequence, first + (n ? t : 0)) + s.v() + h * s.V;
      for (int i = lane; i < V; i += kWarp) v[t * ld + i] = i < n ? to_float(from[i]) : 0.0f;
    }
    if (warp > 0) return;
    float log_alpha = 0, mine = 0;
    if (lane < tokens) {
      const T* const row = proj.at(sequence, first + lane);
      log_alpha = -expf(w.A_log[h]) * softplus(to_float(row[s.a() + h]) + w.dt_bias[h]);
      mine = (s.negative ? 2.0f : 1.0f) * sigmoid(to_float(row[s.b() + h]));
    }
    double sum = static_cast<double>(log_alpha);
#pragma unroll
    for (int distance = 1; distance < kDeltaRows; distance *= 2) {
      const double before = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += before;
    }
    const double end = __shfl_sync(~0u, sum, kDeltaRows - 1);
    if (lane >= kDeltaRows) return;
    const float high = static_cast<float>(sum);
    beta[lane] = mine;
    g[lane] = log_alpha;
    c[lane] = high;
    c_low[lane] = static_cast<float>(sum - static_cast<double>(high));
    from_start[lane] = expf(high);
    to_end[lane] = expf(static_cast<float>(end - sum));
  }

  // a, and the keys' part of s_kq; if wanted p, and that of the queries.
  __device__ void weights(bool with_q) const {
    const int rows = (with_q ? 2 : 1) * kDeltaRows;
    for_delta_tiles(rows, kDeltaRows, [&](DeltaTile& tile) {
      tile.add_dots(kq, ld, kq, ld, K);
      tile.each([&](int i, int j, int row, int col) {
        const int t = row % kDeltaRows;
        const bool is_q = row >= kDeltaRows, seen = is_q ? col <= t : col < t;
        const float value = seen ? tile.sum[i][j] * decay(t, col) : 0.0f;
        a[row * kDeltaStride + col] = is_q ? value : -value;
      });
    });
    for_delta_tiles(rows, V, [&](DeltaTile& tile) {
      tile.add_dots(kq, ld, state, ld, K);
      tile.each([&](int i, int j, int row, int col) {
        s_kq[row * ld + col] = from_start[row % kDeltaRows] * tile.sum[i][j];
      });
    });
  }

  // u; with kScaled v becomes exp(c_Q - c_t) u_t. A thread has whole columns.
  template <bool kScaled>
  __device__ void solve() const {
    for (int col = static_cast<int>(threadIdx.x); col < V; col += kDeltaThreads) {
      float x[kDeltaRows];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) x[i] = v[i * ld + col] - s_kq[i * ld + col];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) {
        x[i] *= beta[i];
#pragma unroll
        for (int j = i + 1; j < kDeltaRows; ++j) x[j] = fmaf(a[j * kDeltaStride + i], x[i], x[j]);
      }
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) {
        u[i * ld + col] = x[i];
        if (kScaled) v[i * ld + col] = to_end[i] * x[i];
      }
    }
  }

  // o, before norm and gate, = s_q + p u. It may be s_q.
  __device__ void outputs(float* o) const {
    for_delta_tiles(kDeltaRows, V, [&](DeltaTile& tile) {
      tile.add(p, kDeltaStride, u, ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) {
        o[row * ld + col] = s_q()[row * ld + col] + tile.sum[i][j];
      });
    });
  }

  // The state after the chunk, from v as solve<true>() left it.
  __device__ void advance_state() const {
    const float left = from_start[kDeltaRows - 1];
    for_delta_tiles(V, K, [&](DeltaTile& tile) {
      tile.add_transposed(v, ld, kq, ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) {
        float& element = state[row * ld + col];
        element = fmaf(left, element, tile.sum[i][j]);
      });
    });
  }
};

// Where a kernel has its space: in shared memory if `kShared`, else a part of `scratch` for every
// block.
template <bool kShared>
__device__ DeltaSpace delta_space(const DeltaShape& s, bool backward, float4* shared,
                                  float* scratch) {
  if constexpr (kShared) return DeltaSpace(s, backward, reinterpret_cast<float*>(shared));
  const int floats = DeltaSpace(s, backward, nullptr).floats;
  return DeltaSpace(s, backward, scratch + int64_t{blockIdx.x} * floats);
}

// Whether so many floats fit in the shared memory of a block, with some left for sums.
inline bool delta_fits(const Context& ctx, int64_t floats) {
  return static_cast<size_t>(floats) * sizeof(float) + 256 <= ctx.stream->shared_memory;
}

}  // namespace mamba3::cuda
