#pragma once

#include "core/context.h"

namespace mamba3 {

// What mixer_scan and mixer_step have in common: the shape, the parameters and the state of a
// Mamba-3 mixer between in_proj and out_proj.

// How the raw decay becomes A: A = min(-act(dd_A), -A_floor).
enum class DecayAct : uint8_t {
  heavy_tail,  // 1 + x for x >= 0, 1 / (1 - x) below; the published checkpoints
  softplus,    // log(1 + e^x); older runs and the flash-linear-attention layout
};

// Which channels form a rotated pair i < S.
enum class RopePairs : uint8_t {
  neighbours,  // (2i, 2i+1); SISO
  halves,      // (i, i + N/2); MIMO
};

struct MixerShape {
  int64_t H = 0;          // heads
  int64_t P = 0;          // head dim
  int64_t N = 0;          // state size
  int64_t G = 1;          // B/C groups; head h uses group h / (H/G)
  int64_t R = 1;          // MIMO rank
  int64_t S = 0;          // rotary angles, at most N/2
  bool mimo = false;      // mimo_x, mimo_z, mimo_o exist (R may still be 1)
  bool out_norm = false;  // norm over P before the gate
  RopePairs rope_pairs = RopePairs::neighbours;
  DecayAct decay_act = DecayAct::heavy_tail;
  float A_floor = 1e-4f;
  float eps = 1e-5f;

  constexpr int64_t d_inner() const { return H * P; }
  // The projection is [z, x, B, C, dd_dt, dd_A, trap, angle]; B and C are laid out (r, g, n).
  constexpr int64_t z() const { return 0; }
  constexpr int64_t x() const { return H * P; }
  constexpr int64_t B() const { return 2 * H * P; }
  constexpr int64_t C() const { return B() + R * G * N; }
  constexpr int64_t dd_dt() const { return C() + R * G * N; }
  constexpr int64_t dd_A() const { return dd_dt() + H; }
  constexpr int64_t trap() const { return dd_A() + H; }
  constexpr int64_t angle() const { return trap() + H; }
  constexpr int64_t d_proj() const { return angle() + S; }
};

// All f32 and dense; in a backward, the gradients, accumulated into.
struct MixerParams {
  View dt_bias;  // (H)
  View B_bias;   // (H, R, N)
  View C_bias;   // (H, R, N)
  View B_norm;   // (N)
  View C_norm;   // (N)
  View D;        // (H)
  View mimo_x;   // (H, R, P), empty unless mimo
  View mimo_z;   // (H, R, P), likewise
  View mimo_o;   // (H, R, P), likewise
  View norm;     // (H, P), empty unless out_norm
};

// What a sequence carries from call to call: rows of a pool, all f32 and dense. Zero is the start
// of a sequence. A boundary is exact only with all four tensors.
struct MixerState {
  View angle;   // (rows, H, S), the accumulated angle modulo 2 pi
  View ssm;     // (rows, H, P, N); on the GPU also bf16
  View k_prev;  // (rows, R, H, N), after norm, bias and rotation
  View v_prev;  // (rows, H, P), x of the last token, before mimo_x
  View rows;    // (sequences) i32: the pool row of each sequence, all different

  bool empty() const { return ssm.empty(); }
};

class Check;
// Shared validation; `sequences` is the number of rows expected in state.rows.
void check_mixer_shape(const Check& check, const MixerShape& shape);
void check_mixer_params(const Check& check, const MixerShape& shape, const MixerParams& params);
void check_mixer_state(const Check& check, const MixerShape& shape, const MixerState& state,
                       int64_t sequences);

}  // namespace mamba3
