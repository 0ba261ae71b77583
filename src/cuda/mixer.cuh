#pragma once

// What the GPU kernels of the Mamba-3 mixer share: arguments that kernels take by value, and the
// arithmetic of single elements.

#include "cuda/device.cuh"
#include "ops/mixer.h"

namespace mamba3::cuda {

// The parameters, or their gradients; null when absent.
struct MixerWeights {
  float *dt_bias, *A_log, *B_bias, *C_bias, *B_norm, *C_norm, *D, *mimo_x, *mimo_z, *mimo_o, *norm;

  MixerWeights() = default;
  explicit MixerWeights(const MixerParams& p)
      : dt_bias(data<float>(p.dt_bias)),
        A_log(data<float>(p.A_log)),
        B_bias(data<float>(p.B_bias)),
        C_bias(data<float>(p.C_bias)),
        B_norm(data<float>(p.B_norm)),
        C_norm(data<float>(p.C_norm)),
        D(data<float>(p.D)),
        mimo_x(data<float>(p.mimo_x)),
        mimo_z(data<float>(p.mimo_z)),
        mimo_o(data<float>(p.mimo_o)),
        norm(data<float>(p.norm)) {}
};

// A pool of states whose ssm is of type S; null when there is none.
template <typename S>
struct MixerPool {
  float* angle;
  S* ssm;
  float* k_prev;
  float* v_prev;
  const int32_t* rows;

  explicit MixerPool(const MixerState& state)
      : angle(data<float>(state.angle)),
        ssm(data<S>(state.ssm)),
        k_prev(data<float>(state.k_prev)),
        v_prev(data<float>(state.v_prev)),
        rows(data<int32_t>(state.rows)) {}
};

inline constexpr float kPi = 3.14159265358979f;

__device__ inline float softplus(float x) {
  return x > 20 ? x : log1pf(expf(x));
}

// -A = act(dd_A), before the floor, and its derivative.
__device__ inline float decay_act(DecayAct act, float x) {
  if (act == DecayAct::softplus) return softplus(x);
  return x >= 0 ? 1 + x : 1 / (1 - x);
}
__device__ inline float decay_act_derivative(DecayAct act, float x) {
  if (act == DecayAct::softplus) return sigmoid(x);
  return x >= 0 ? 1 : 1 / ((1 - x) * (1 - x));
}

// -A of head h, from a row of the projection.
template <typename T>
__device__ inline float decay_rate(const MixerShape& s, const MixerWeights& w, const T* row,
                                   int h) {
  if (!s.has_dd_A()) return expf(w.A_log[h]);
  return fmaxf(decay_act(s.decay_act, to_float(row[s.dd_A() + h])), s.A_floor);
}

// lam of head h.
template <typename T>
__device__ inline float trapezoid(const MixerShape& s, const T* row, int h) {
  if (s.has_trap()) return sigmoid(to_float(row[s.trap() + h]));
  return s.discretisation == Discretisation::half ? 0.5f : 1.0f;
}

// The angle of pair i moves on by theta times the step.
template <typename T>
__device__ inline float theta_of(const MixerShape& s, const T* row, int i) {
  if (s.rope == Rope::data) return kPi * tanhf(to_float(row[s.angle() + i]));
  return static_cast<float>(pow(10000.0, -static_cast<double>(i) / static_cast<double>(s.S)));
}
__device__ inline float angle_step(const MixerShape& s, float dt) {
  return s.rope == Rope::data ? dt : 1.0f;
}

// Channel n of a key or query before the rotation. `norm` and `bias` may be null.
__device__ inline float key_channel(float raw, float rstd, const float* norm, const float* bias,
                                    int n) {
  return fmaf(raw * rstd, norm ? norm[n] : 1.0f, bias ? bias[n] : 0.0f);
}

// angle mod 2 pi. 2 pi is subtracted in two parts, so that the constant's rounding does not add up
// over a long sequence; the small part while the angle is small, or it would be rounded away.
__device__ inline float reduced_angle(float angle) {
  constexpr double kTurn = 6.283185307179586;
  constexpr float kTurnHigh = static_cast<float>(kTurn);
  constexpr float kTurnLow = static_cast<float>(kTurn - static_cast<double>(kTurnHigh));
  const float turns = floorf(angle * static_cast<float>(1 / kTurn));
  return turns > 0 ? fmaf(-turns, kTurnLow, fmaf(-turns, kTurnHigh, angle))
                   : fmaf(-turns, kTurnHigh, fmaf(-turns, kTurnLow, angle));
}

// The N - S parts of a key or query that a rotation treats apart: pairs i < S, then the channels
// that pass through. `a` is the first channel of a part, and `b` the second one of a pair.
struct RotaryPart {
  int a, b;
  bool pair;
};
__device__ inline RotaryPart rotary_part(const MixerShape& s, int i) {
  const int N = static_cast<int>(s.N), S = static_cast<int>(s.S);
  if (s.rope_pairs == RopePairs::neighbours) {
    return i < S ? RotaryPart{2 * i, 2 * i + 1, true} : RotaryPart{S + i, S + i, false};
  }
  if (i < S) return {i, i + N / 2, true};
  const int channel = i < N / 2 ? i : i + S;
  return {channel, channel, false};
}

}  // namespace mamba3::cuda
