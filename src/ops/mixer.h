#pragma once

#include "core/context.h"

namespace mamba3 {

// What mixer_scan and mixer_step have in common: the shape, the parameters and the state of a
// Mamba-3 mixer between in_proj and out_proj, of the ablations in the paper's tables 5a, 5b and 8,
// and of a Mamba-2 mixer, which is one of them.

// How the raw decay becomes A: A = min(-act(dd_A), -A_floor).
enum class DecayAct : uint8_t {
  heavy_tail,  // 1 + x for x >= 0, 1 / (1 - x) below; the published checkpoints
  softplus,    // log(1 + e^x); older runs and the flash-linear-attention layout
  constant,    // there is no dd_A: A = -exp(A_log), whatever the token; Mamba-2
};

// How far the angle of a rotated pair i < S moves with a token.
enum class Rope : uint8_t {
  data,      // pi tanh(angle_i) dt: the complex state of the paper (Prop. 3 and 4)
  standard,  // 10000^(-i/S): the positions of attention
};

// The weight lam of a token itself against (1 - lam) of the one before it (paper, Prop. 1).
enum class Discretisation : uint8_t {
  trapezoidal,  // sigmoid(trap)
  half,         // 1/2: the classical trapezoidal rule
  euler,        // 1: Mamba-2's
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
  bool bc_norm = true;    // norm of B and C over N
  bool bc_bias = true;    // bias of B and C, after the norm
  RopePairs rope_pairs = RopePairs::neighbours;
  Rope rope = Rope::data;
  Discretisation discretisation = Discretisation::trapezoidal;
  DecayAct decay_act = DecayAct::heavy_tail;
  float A_floor = 1e-4f;
  float eps = 1e-5f;

  constexpr int64_t d_inner() const { return H * P; }
  constexpr bool has_dd_A() const { return decay_act != DecayAct::constant; }
  constexpr bool has_trap() const { return discretisation == Discretisation::trapezoidal; }
  constexpr bool has_angles() const { return rope == Rope::data && S > 0; }
  // The columns from x() on that a short convolution takes: x, B and C.
  constexpr int64_t conv_channels() const { return dd_dt() - x(); }
  // Whether this is Mamba-3 as published, or without rotation: what the fast kernels of the GPU are
  // for.
  constexpr bool is_published() const {
    return bc_norm && bc_bias && has_dd_A() && has_trap() && rope == Rope::data;
  }
  // The projection is [z, x, B, C, dd_dt, dd_A, trap, angle], the last three if they exist; B and C
  // are laid out (r, g, n).
  constexpr int64_t z() const { return 0; }
  constexpr int64_t x() const { return H * P; }
  constexpr int64_t B() const { return 2 * H * P; }
  constexpr int64_t C() const { return B() + R * G * N; }
  constexpr int64_t dd_dt() const { return C() + R * G * N; }
  constexpr int64_t dd_A() const { return dd_dt() + H; }
  constexpr int64_t trap() const { return dd_A() + (has_dd_A() ? H : 0); }
  constexpr int64_t angle() const { return trap() + (has_trap() ? H : 0); }
  constexpr int64_t d_proj() const { return angle() + (has_angles() ? S : 0); }
};

// All f32 and dense; in a backward, the gradients, accumulated into.
struct MixerParams {
  View dt_bias;  // (H)
  View A_log;    // (H), empty unless decay_act is constant
  View B_bias;   // (H, R, N), empty without bc_bias
  View C_bias;   // (H, R, N), likewise
  View B_norm;   // (N), empty without bc_norm
  View C_norm;   // (N), likewise
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

// What a token adds to the angle of pair i under Rope::standard.
float standard_turn(int64_t i, int64_t S);

class Check;
// Shared validation; `sequences` is the number of rows expected in state.rows.
void check_mixer_shape(const Check& check, const MixerShape& shape);
void check_mixer_params(const Check& check, const MixerShape& shape, const MixerParams& params);
void check_mixer_state(const Check& check, const MixerShape& shape, const MixerState& state,
                       int64_t sequences);

}  // namespace mamba3
