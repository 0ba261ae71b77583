#pragma once

#include <cassert>
#include <numbers>
#include <span>
#include <vector>

#include "ops/mixer.h"
#include "ref/number.h"
#include "ref/rms_norm.h"

namespace mamba3::ref {

// The mixer of ops/mixer.h one token at a time, as the paper writes it (Prop. 1 and 4; MIMO,
// section 3.3).
template <typename T>
struct MixerParams {
  std::vector<T> dt_bias, A_log, B_bias, C_bias, B_norm, C_norm, D, mimo_x, mimo_z, mimo_o, norm;
};

template <typename T>
struct MixerState {
  std::vector<T> angle, ssm, k_prev, v_prev;  // (H,S) (H,P,N) (R,H,N) (H,P)

  static MixerState zero(const MixerShape& s) {
    const auto size = [](int64_t n) { return std::vector<T>(static_cast<size_t>(n), T(0)); };
    return {size(s.H * s.S), size(s.H * s.P * s.N), size(s.R * s.H * s.N), size(s.H * s.P)};
  }
};

template <typename T>
void rotate(const MixerShape& s, T* channels, const T* angle) {
  using std::cos, std::sin;
  for (int64_t i = 0; i < s.S; ++i) {
    const bool neighbours = s.rope_pairs == RopePairs::neighbours;
    T& a = channels[neighbours ? 2 * i : i];
    T& b = channels[neighbours ? 2 * i + 1 : i + s.N / 2];
    const T c = cos(angle[i]), d = sin(angle[i]);
    const T rotated_a = a * c - b * d;
    b = a * d + b * c;
    a = rotated_a;
  }
}

template <typename T>
T decay_act(DecayAct act, const T& x) {
  if (act == DecayAct::softplus) return softplus(x);
  return real_part(x) >= 0 ? T(1) + x : T(1) / (T(1) - x);
}

// A of head h.
template <typename T>
T A_of_head(const MixerShape& s, const MixerParams<T>& p, const T* proj, int64_t h) {
  using std::exp;
  if (!s.has_dd_A()) return -exp(p.A_log[static_cast<size_t>(h)]);
  const T A = -decay_act(s.decay_act, proj[s.dd_A() + h]);
  const double most = -static_cast<double>(s.A_floor);
  return real_part(A) > most ? T(most) : A;
}

// lam of head h.
template <typename T>
T trapezoid(const MixerShape& s, const T* proj, int64_t h) {
  switch (s.discretisation) {
    case Discretisation::trapezoidal:
      return sigmoid(proj[s.trap() + h]);
    case Discretisation::half:
      return T(0.5);
    case Discretisation::euler:
      return T(1);
  }
  return T(0);
}

// What a token with step size dt adds to the angle of pair i.
template <typename T>
T turn(const MixerShape& s, const T* proj, const T& dt, int64_t i) {
  using std::tanh;
  if (s.rope == Rope::data) return T(std::numbers::pi) * tanh(proj[s.angle() + i]) * dt;
  return T(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(s.S)));
}

// One token: proj (d_proj) -> y (H P), the state updated in place.
template <typename T>
void mixer_step(const MixerShape& s, const MixerParams<T>& p, const T* proj, MixerState<T>& state,
                T* y) {
  using std::exp, std::floor;
  const int64_t H = s.H, P = s.P, N = s.N, G = s.G, R = s.R, S = s.S;
  const auto normed_rows = [&](const T* rows, const std::vector<T>& weight) {
    std::vector<std::vector<T>> out;  // (r, g)
    for (int64_t i = 0; i < R * G; ++i) {
      const T* row = rows + i * N;
      out.push_back(s.bc_norm ? normed(row, weight.data(), N, s.eps)
                              : std::vector<T>(row, row + N));
    }
    return out;
  };
  const auto B = normed_rows(proj + s.B(), p.B_norm), C = normed_rows(proj + s.C(), p.C_norm);
  const auto at = [](const std::vector<T>& values, int64_t i) {
    return values[static_cast<size_t>(i)];
  };
  for (int64_t h = 0; h < H; ++h) {
    const int64_t g = h / (H / G);
    const T dt = softplus(proj[s.dd_dt() + h] + at(p.dt_bias, h));
    const T lam = trapezoid(s, proj, h);
    const T a = exp(A_of_head(s, p, proj, h) * dt);
    T* angle = state.angle.data() + h * S;
    for (int64_t i = 0; i < S; ++i) {
      constexpr double kTurn = 2 * std::numbers::pi;
      angle[i] += turn(s, proj, dt, i);
      angle[i] -= T(kTurn * floor(real_part(angle[i]) / kTurn));
    }
    const T* x = proj + s.x() + h * P;
    const T* z = proj + s.z() + h * P;
    const auto up = [&](const std::vector<T>& weight, int64_t r, int64_t i) {
      return s.mimo ? at(weight, (h * R + r) * P + i) : T(1);
    };
    T* ssm = state.ssm.data() + h * P * N;
    T* v_prev = state.v_prev.data() + h * P;
    for (int64_t i = 0; i < P * N; ++i) ssm[i] *= a;
    std::vector<std::vector<T>> q;
    for (int64_t r = 0; r < R; ++r) {
      std::vector<T> k = B[static_cast<size_t>(r * G + g)];
      q.push_back(C[static_cast<size_t>(r * G + g)]);
      for (int64_t n = 0; s.bc_bias && n < N; ++n) {
        k[static_cast<size_t>(n)] += at(p.B_bias, (h * R + r) * N + n);
        q.back()[static_cast<size_t>(n)] += at(p.C_bias, (h * R + r) * N + n);
      }
      rotate(s, k.data(), angle);
      rotate(s, q.back().data(), angle);
      T* k_prev = state.k_prev.data() + (r * H + h) * N;
      for (int64_t i = 0; i < P; ++i) {
        const T before = (T(1) - lam) * dt * a * v_prev[i] * up(p.mimo_x, r, i);
        const T now = lam * dt * x[i] * up(p.mimo_x, r, i);
        for (int64_t n = 0; n < N; ++n) {
          ssm[i * N + n] += before * k_prev[n] + now * k[static_cast<size_t>(n)];
        }
      }
      std::copy(k.begin(), k.end(), k_prev);
    }
    std::copy(x, x + P, v_prev);
    std::vector<T> out(static_cast<size_t>(P), T(0));
    for (int64_t r = 0; r < R; ++r) {
      std::vector<T> y_r(static_cast<size_t>(P));
      for (int64_t i = 0; i < P; ++i) {
        T sum = at(p.D, h) * x[i] * up(p.mimo_x, r, i);
        for (int64_t n = 0; n < N; ++n)
          sum += ssm[i * N + n] * q[static_cast<size_t>(r)][static_cast<size_t>(n)];
        y_r[static_cast<size_t>(i)] = sum;
      }
      if (s.out_norm) y_r = normed(y_r.data(), p.norm.data() + h * P, P, s.eps);
      for (int64_t i = 0; i < P; ++i) {
        out[static_cast<size_t>(i)] +=
            up(p.mimo_o, r, i) * y_r[static_cast<size_t>(i)] * silu(z[i] * up(p.mimo_z, r, i));
      }
    }
    std::copy(out.begin(), out.end(), y + h * P);
  }
}

// T tokens of one sequence: proj (T, d_proj) -> y (T, H P).
template <typename T>
void mixer_scan(const MixerShape& s, const MixerParams<T>& p, const T* proj, int64_t tokens,
                MixerState<T>& state, T* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    mixer_step(s, p, proj + t * s.d_proj(), state, y + t * s.d_inner());
  }
}

}  // namespace mamba3::ref
