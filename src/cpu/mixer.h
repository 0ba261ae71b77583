#pragma once

#include <vector>

#include "cpu/small_matrix.h"
#include "ops/mixer.h"

namespace mamba3::cpu {

// What mixer_scan, its backward and mixer_step share outside of SIMD code.

// The f32 parameters as pointers, null when absent.
struct MixerWeights {
  const float *dt_bias, *A_log, *B_bias, *C_bias, *B_norm, *C_norm, *D, *mimo_x, *mimo_z, *mimo_o,
      *norm;
  explicit MixerWeights(const MixerParams& params);
};

// The small quantities of every token, computed once for all heads: 1% of the bytes.
struct MixerTokens {
  float* dt;      // (tokens, H) step size
  float* A_dt;    // (tokens, H) log of the decay
  float* lam;     // (tokens, H) trapezoid weight
  float* rstd_B;  // (tokens, R, G)
  float* rstd_C;  // (tokens, R, G)
  float* theta;   // (tokens, S) of the angles: pi * tanh(angle) a unit of dt, or a constant a token

  MixerTokens(const MixerShape& shape, int64_t tokens, ScratchScope& scratch);
};

// One sequence of a batch, packed or not.
struct MixerSequence {
  int64_t index;  // in the batch
  int64_t token;  // b * T + t of that token: its index in MixerTokens
  int64_t T;
};

std::vector<MixerSequence> mixer_sequences(const View& proj, const View& cu_seqlens);

// The state of one head of one sequence, in its row of the pool.
struct HeadState {
  float* angle;   // (S)
  float* ssm;     // (P, N)
  float* v_prev;  // (P)

  HeadState(const MixerShape& shape, const MixerState& state, int64_t sequence, int64_t h);
  float* k_prev(int64_t r) const { return k_prev_ + r * k_stride_; }  // (N)

 private:
  float* k_prev_;
  int64_t k_stride_;
};

// The scratch of one thread for the chunks of a scan: rows are the (t, r) of a chunk, M = Q R of
// them.
struct ChunkScratch {
  int64_t Q;             // tokens of a chunk
  Matrix q, k;           // (M, N)
  Matrix k_t;            // (N, M) k transposed
  Matrix v, v_scaled;    // (M, P)
  Matrix weights;        // (M, M) what each row takes of v
  Matrix y;              // (M, P)
  Matrix state;          // (N, P) S transposed
  Matrix cosine, sine;   // (Q, S)
  Matrix angle;          // (1, S)
  Matrix c, c_low;       // (1, Q) see mixer_chunk-inl.h
  Matrix scale, gamma;   // (1, Q)
  Matrix c_columns;      // (1, M) c, repeated for the R rows of a token
  Matrix c_low_columns;  // (1, M)
  Matrix scale_columns;  // (1, M)
  Matrix decay;          // (1, M)
  int64_t floats;        // what all of them take

  // With states and angles for several heads; those of the first are set.
  ChunkScratch(const MixerShape& shape, int64_t Q, int64_t heads, float* base = nullptr);
  ChunkScratch of_head(int64_t i, int64_t N) const;
};

// Row b * T + t of a view (B, T, columns).
inline float* token_row(const View& view, int64_t token) {
  const int64_t T = view.dim(1);
  return view.as<float>() + token / T * view.stride(0) + token % T * view.stride(1);
}

// -A = act(dd_A), before the floor, and its derivative.
float decay_act(DecayAct act, float x);
float decay_act_derivative(DecayAct act, float x);
// -A of head h, from a row of the projection.
float decay_rate(const MixerShape& shape, const MixerWeights& weights, const float* proj,
                 int64_t h);
// lam of head h.
float trapezoid(const MixerShape& shape, const float* proj, int64_t h);

}  // namespace mamba3::cpu
