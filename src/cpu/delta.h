#pragma once

#include "cpu/mixer.h"
#include "cpu/small_matrix.h"
#include "ops/delta.h"

namespace mamba3::cpu {

// What delta_scan, its backward and delta_step share outside of SIMD code.

// The f32 parameters, or their gradients, as pointers.
struct DeltaWeights {
  float *A_log, *dt_bias, *norm;
  explicit DeltaWeights(const DeltaParams& p)
      : A_log(p.A_log.as<float>()), dt_bias(p.dt_bias.as<float>()), norm(p.norm.as<float>()) {}
};

// The state (V, K) of one head of one sequence, in its row of the pool.
inline float* delta_head_state(const DeltaShape& s, const DeltaState& state, int64_t sequence,
                               int64_t h) {
  const int64_t row = state.rows.as<int32_t>()[sequence];
  return state.delta.as<float>() + (row * s.H + h) * s.V * s.K;
}

// The scratch of one thread for the chunks of a scan; see cpu/delta_chunk-inl.h.
struct DeltaScratch {
  int64_t Q;           // tokens of a chunk
  Matrix q, k;         // (Q, K)
  Matrix k_t;          // (K, Q) k transposed
  Matrix v, ks, u, o;  // (Q, V)
  Matrix u_scaled;     // (Q, V)
  Matrix a, p;         // (Q, Q)
  Matrix state;        // (K, V) S transposed
  Matrix rstd_q;       // (1, Q) 1 / the length of q, and of k
  Matrix rstd_k;       // (1, Q)
  Matrix beta, g;      // (1, Q) g: log alpha
  Matrix c, c_low;     // (1, Q) sums of g, each as the sum of two floats
  Matrix decay;        // (1, Q)
  Matrix from_start;   // (1, Q) exp(c_t)
  Matrix to_end;       // (1, Q) exp(c_Q - c_t)
  int64_t floats;      // what all of them take

  DeltaScratch(const DeltaShape& s, int64_t tokens, float* base) : Q(tokens) {
    SmallMatrices layout(base);
    q = layout.take(Q, s.K), k = layout.take(Q, s.K), k_t = layout.take(s.K, Q);
    v = layout.take(Q, s.V), ks = layout.take(Q, s.V);
    u = layout.take(Q, s.V), o = layout.take(Q, s.V), u_scaled = layout.take(Q, s.V);
    a = layout.take(Q, Q), p = layout.take(Q, Q);
    state = layout.take(s.K, s.V);
    rstd_q = layout.take(1, Q), rstd_k = layout.take(1, Q);
    beta = layout.take(1, Q), g = layout.take(1, Q);
    c = layout.take(1, Q), c_low = layout.take(1, Q), decay = layout.take(1, Q);
    from_start = layout.take(1, Q), to_end = layout.take(1, Q);
    floats = layout.floats();
  }
};

// The same for the backward; see cpu/delta_scan_backward.cc.
struct DeltaBackwardScratch {
  DeltaScratch chunk;
  Matrix os, kz;             // (Q, V) exp(c_i) S q_i and exp(c_Q - c_i) Z k_i
  Matrix d_o, d_r, d_v;      // (Q, V)
  Matrix u_t;                // (V, Q)
  Matrix d_q, d_k;           // (Q, K)
  Matrix d_p, d_a;           // (Q, Q)
  Matrix Z;                  // (K, V)
  Matrix state_t, Z_t;       // (V, K)
  Matrix d_beta, d_c, sums;  // (1, Q)
  Matrix normed, d_normed;   // (1, V)
  Matrix states;             // (chunks K, V) the state before each chunk, transposed
  int64_t floats;            // what all of them take
  int64_t cleared;           // of those, what has to be zero at first

  DeltaBackwardScratch(const DeltaShape& s, int64_t Q, int64_t chunks, float* base)
      : chunk(s, Q, base) {
    SmallMatrices layout(base ? base + chunk.floats : nullptr);
    d_o = layout.take(Q, s.V), d_r = layout.take(Q, s.V);
    d_v = layout.take(Q, s.V);
    os = layout.take(Q, s.V), kz = layout.take(Q, s.V);
    u_t = layout.take(s.V, Q);
    d_q = layout.take(Q, s.K), d_k = layout.take(Q, s.K);
    d_p = layout.take(Q, Q), d_a = layout.take(Q, Q);
    Z = layout.take(s.K, s.V);
    state_t = layout.take(s.V, s.K), Z_t = layout.take(s.V, s.K);
    d_beta = layout.take(1, Q), d_c = layout.take(1, Q), sums = layout.take(1, Q);
    normed = layout.take(1, s.V), d_normed = layout.take(1, s.V);
    cleared = chunk.floats + layout.floats();
    states = layout.take(chunks * s.K, s.V);
    floats = chunk.floats + layout.floats();
  }
};

// The gradients of the parameters that one task gives.
struct DeltaTaskGradients {
  float *A_log, *dt_bias;  // (1)
  float* norm;             // (V)

  explicit DeltaTaskGradients(float* base) : A_log(base), dt_bias(base + 1), norm(base + 2) {}
  static int64_t floats(const DeltaShape& s) { return 2 + s.V; }
};

}  // namespace mamba3::cpu
