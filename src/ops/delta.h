#pragma once

#include "core/context.h"

namespace mamba3 {

// What delta_scan and delta_step have in common: the shape, the parameters and the state of a Gated
// DeltaNet mixer (Yang, Kautz and Hatamizadeh, "Gated Delta Networks", ICLR 2025, section 3)
// between the short convolution and out_proj. For every head, with the raw q, k, v, z, b, a of a
// token,
//   q' = q / sqrt(|q|^2 + kDeltaNormEps) / sqrt(K),   k' = k / sqrt(|k|^2 + kDeltaNormEps)
//   alpha = exp(-exp(A_log) softplus(a + dt_bias)),   beta = sigmoid(b), times 2 if `negative`
//   S = alpha S + beta (v - alpha S k') k'^T          S is (V, K)
//   y = rmsnorm over V of (S q'), times norm, times silu(z)

// Added to the squared length of queries and keys.
inline constexpr float kDeltaNormEps = 1e-6f;
// K and V of a head are at most this.
inline constexpr int64_t kWidestDeltaHead = 1024;

struct DeltaShape {
  int64_t H = 0;  // heads
  int64_t K = 0;  // key dim of a head
  int64_t V = 0;  // value dim of a head
  // beta in (0, 2), so that the eigenvalue of the transition along k' lies in alpha [-1, 1] instead
  // of alpha [0, 1] (Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative
  // Eigenvalues", ICLR 2025).
  bool negative = false;
  float eps = 1e-5f;  // of the output norm

  constexpr int64_t d_inner() const { return H * V; }
  // The projection is [q, k, v, z, b, a]; q, k, v have been through the convolution.
  constexpr int64_t q() const { return 0; }
  constexpr int64_t k() const { return H * K; }
  constexpr int64_t v() const { return 2 * H * K; }
  constexpr int64_t z() const { return v() + H * V; }
  constexpr int64_t b() const { return z() + H * V; }
  constexpr int64_t a() const { return b() + H; }
  constexpr int64_t d_proj() const { return a() + H; }
  // The first channels of the projection, which the convolution takes.
  constexpr int64_t conv_channels() const { return z(); }
};

// All f32 and dense; in a backward, the gradients, accumulated into.
struct DeltaParams {
  View A_log;    // (H)
  View dt_bias;  // (H)
  View norm;     // (V), shared by the heads
};

// What a sequence carries from call to call: rows of a pool. Zero is the start of a sequence.
struct DeltaState {
  View delta;  // (rows, H, V, K) f32, dense
  View rows;   // (sequences) i32: the pool row of each sequence, all different

  bool empty() const { return delta.empty(); }
};

class Check;
// Shared validation; `sequences` is the number of rows expected in state.rows.
void check_delta_shape(const Check& check, const DeltaShape& shape);
void check_delta_params(const Check& check, const DeltaShape& shape, const DeltaParams& params);
void check_delta_state(const Check& check, const DeltaShape& shape, const DeltaState& state,
                       int64_t sequences);

}  // namespace mamba3
