// The parts of the Mamba-3 mixer that the scan, its backward and the step share: token terms, keys
// and queries, and the output gate. Included once per instruction set (Highway's foreach_target).

#include <cmath>
#include <numbers>

#include "cpu/mixer.h"
#include "cpu/small_gemm-inl.h"
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

#if defined(MAMBA3_CPU_MIXER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_MIXER_INL_H_
#undef MAMBA3_CPU_MIXER_INL_H_
#else
#define MAMBA3_CPU_MIXER_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// body(d, i) for i in [0, n) in steps of Lanes(d): whole vectors, then quarters, then single
// elements, so that nothing outside of [0, n) is touched.
template <typename Body>
HWY_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  const auto steps = [&](auto d) HWY_ATTR {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
    for (; i + lanes <= n; i += lanes) body(d, i);
  };
  steps(hn::ScalableTag<float>());
  steps(hn::CappedTag<float, 4>());
  steps(hn::CappedTag<float, 1>());
}

HWY_INLINE float sum_of(int64_t n, const float* a, const float* b) {
  const hn::ScalableTag<float> d;
  auto sum = hn::Zero(d);
  float rest = 0;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    sum = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum);
  for (; i < n; ++i) rest += a[i] * b[i];
  return hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
}

// y += a * x
HWY_INLINE void add_scaled(int64_t n, float a, const float* x, float* y) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR {
    hn::StoreU(hn::MulAdd(hn::Set(d, a), hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, y + i);
  });
}

// y = a * x
HWY_INLINE void scale(int64_t n, float a, const float* x, float* y) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR {
    hn::StoreU(hn::Mul(hn::Set(d, a), hn::LoadU(d, x + i)), d, y + i);
  });
}

HWY_INLINE void copy(int64_t n, const float* x, float* y) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR { hn::StoreU(hn::LoadU(d, x + i), d, y + i); });
}

HWY_INLINE void zero(int64_t n, float* y) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR { hn::StoreU(hn::Zero(d), d, y + i); });
}

// y (+)= a * b, elementwise
template <bool kAccumulate>
HWY_INLINE void product(int64_t n, const float* a, const float* b, float* y) {
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR {
    const auto ab = hn::Mul(hn::LoadU(d, a + i), hn::LoadU(d, b + i));
    hn::StoreU(kAccumulate ? hn::Add(ab, hn::LoadU(d, y + i)) : ab, d, y + i);
  });
}

HWY_INLINE float rstd_of(int64_t n, const float* x, float eps) {
  return 1 / std::sqrt(sum_of(n, x, x) / static_cast<float>(n) + eps);
}

template <typename D, typename V = hn::Vec<D>>
HWY_INLINE V sigmoid(D d, V x) {
  return hn::Div(hn::Set(d, 1.0f), hn::Add(hn::Set(d, 1.0f), hn::Exp(d, hn::Neg(x))));
}

// The terms of one token: its projection row -> row `token` of `terms`.
HWY_INLINE void token_terms(const MixerShape& s, const MixerWeights& w, const float* proj,
                            int64_t token, const MixerTokens& terms) {
  for (int64_t h = 0; h < s.H; ++h) {
    const float raw = proj[s.dd_dt() + h] + w.dt_bias[h];
    const float dt = raw > 20 ? raw : std::log1p(std::exp(raw));
    terms.dt[token * s.H + h] = dt;
    terms.A_dt[token * s.H + h] = -decay_rate(s, w, proj, h) * dt;
    terms.lam[token * s.H + h] = trapezoid(s, proj, h);
  }
  const auto rstd = [&](const float* row) { return s.bc_norm ? rstd_of(s.N, row, s.eps) : 1.0f; };
  for (int64_t i = 0; i < s.R * s.G; ++i) {
    terms.rstd_B[token * s.R * s.G + i] = rstd(proj + s.B() + i * s.N);
    terms.rstd_C[token * s.R * s.G + i] = rstd(proj + s.C() + i * s.N);
  }
  if (s.rope == Rope::standard) return;
  float* theta = terms.theta + token * s.S;
  for_vectors(s.S, [&](auto d, int64_t i) HWY_ATTR {
    const auto x = hn::LoadU(d, proj + s.angle() + i);
    hn::StoreU(hn::Mul(hn::Set(d, std::numbers::pi_v<float>), hn::Tanh(d, x)), d, theta + i);
  });
}

// angle = (angle + theta * dt) mod 2 pi, and its cosine and sine. 2 pi is subtracted in two
// parts, so that the constant's rounding does not add up over a long sequence; below zero the small
// part is added first, while it still counts beside what is there.
HWY_INLINE void advance_angle(int64_t S, const float* theta, float dt, float* angle, float* cosine,
                              float* sine) {
  constexpr double kTurn = 2 * std::numbers::pi;
  constexpr float kTurnHigh = static_cast<float>(kTurn);
  constexpr float kTurnLow = static_cast<float>(kTurn - static_cast<double>(kTurnHigh));
  for_vectors(S, [&](auto d, int64_t i) HWY_ATTR {
    auto phi = hn::MulAdd(hn::LoadU(d, theta + i), hn::Set(d, dt), hn::LoadU(d, angle + i));
    const auto turns = hn::Floor(hn::Mul(phi, hn::Set(d, static_cast<float>(1 / kTurn))));
    const auto high = hn::Set(d, kTurnHigh), low = hn::Set(d, kTurnLow);
    const auto high_first = hn::NegMulAdd(turns, low, hn::NegMulAdd(turns, high, phi));
    const auto low_first = hn::NegMulAdd(turns, high, hn::NegMulAdd(turns, low, phi));
    phi = hn::IfThenElse(hn::Gt(turns, hn::Zero(d)), high_first, low_first);
    hn::StoreU(phi, d, angle + i);
    hn::StoreU(hn::Cos(d, phi), d, cosine + i);
    hn::StoreU(hn::Sin(d, phi), d, sine + i);
  });
}

// The same under Rope::standard, `tokens` after `start`, in double: roundings at every token would
// add up. `angle` may be null.
HWY_INLINE void standard_angle(int64_t S, int64_t tokens, const float* start, float* angle,
                               float* cosine, float* sine) {
  constexpr double kTurn = 2 * std::numbers::pi;
  for (int64_t i = 0; i < S; ++i) {
    const double turn = static_cast<double>(standard_turn(i, S));
    double phi = static_cast<double>(start[i]) + static_cast<double>(tokens) * turn;
    phi -= kTurn * std::floor(phi / kTurn);
    if (angle) angle[i] = static_cast<float>(phi);
    cosine[i] = static_cast<float>(std::cos(phi));
    sine[i] = static_cast<float>(std::sin(phi));
  }
}

// body(d, a, b, i): the rotated pairs i of `channels`, as vectors a and b that the body replaces.
template <typename Body>
HWY_INLINE void for_pairs(const MixerShape& s, float* channels, const Body& body) {
  if (s.rope_pairs == RopePairs::halves) {
    for_vectors(s.S, [&](auto d, int64_t i) HWY_ATTR {
      auto a = hn::LoadU(d, channels + i), b = hn::LoadU(d, channels + s.N / 2 + i);
      body(d, a, b, i);
      hn::StoreU(a, d, channels + i);
      hn::StoreU(b, d, channels + s.N / 2 + i);
    });
  } else {
    for_vectors(s.S, [&](auto d, int64_t i) HWY_ATTR {
      hn::Vec<decltype(d)> a, b;
      hn::LoadInterleaved2(d, channels + 2 * i, a, b);
      body(d, a, b, i);
      hn::StoreInterleaved2(a, b, d, channels + 2 * i);
    });
  }
}

// channels = rot(channels, angle), or its inverse with kSign = -1.
template <int kSign = 1>
HWY_INLINE void rotate(const MixerShape& s, const float* cosine, const float* sine,
                       float* channels) {
  for_pairs(s, channels, [&](auto d, auto& a, auto& b, int64_t i) HWY_ATTR {
    const auto c = hn::LoadU(d, cosine + i);
    const auto e = kSign > 0 ? hn::LoadU(d, sine + i) : hn::Neg(hn::LoadU(d, sine + i));
    const auto rotated = hn::NegMulAdd(b, e, hn::Mul(a, c));
    b = hn::MulAdd(a, e, hn::Mul(b, c));
    a = rotated;
  });
}

// out = rot(raw * rstd * weight + bias, angle): a key from B, a query from C. `row` is that of the
// biases; weights and biases may be null.
HWY_INLINE void key_or_query(const MixerShape& s, const float* raw, float rstd, const float* weight,
                             const float* biases, int64_t row, const float* cosine,
                             const float* sine, float* out) {
  const float* bias = biases ? biases + row * s.N : nullptr;
  for_vectors(s.N, [&](auto d, int64_t i) HWY_ATTR {
    auto channel = hn::Mul(hn::LoadU(d, raw + i), hn::Set(d, rstd));
    if (weight && bias) {
      channel = hn::MulAdd(channel, hn::LoadU(d, weight + i), hn::LoadU(d, bias + i));
    } else if (weight) {
      channel = hn::Mul(channel, hn::LoadU(d, weight + i));
    } else if (bias) {
      channel = hn::Add(channel, hn::LoadU(d, bias + i));
    }
    hn::StoreU(channel, d, out + i);
  });
  rotate(s, cosine, sine, out);
}

// v_r = x * mimo_x[h, r]; SISO: v = x.
HWY_INLINE void value(const MixerShape& s, const MixerWeights& w, int64_t h, int64_t r,
                      const float* x, float* v) {
  if (w.mimo_x) {
    product<false>(s.P, x, w.mimo_x + (h * s.R + r) * s.P, v);
  } else {
    for_vectors(s.P,
                [&](auto d, int64_t i) HWY_ATTR { hn::StoreU(hn::LoadU(d, x + i), d, v + i); });
  }
}

// d_x = rstd * (d_out - normed * mean(d_out . normed)): the backward of normed = x * rstd(x). d_x
// may be either input.
HWY_INLINE void norm_backward(int64_t n, const float* normed, float rstd, const float* d_out,
                              float* d_x) {
  const float mean = sum_of(n, d_out, normed) / static_cast<float>(n);
  for_vectors(n, [&](auto d, int64_t i) HWY_ATTR {
    const auto d_i =
        hn::NegMulAdd(hn::LoadU(d, normed + i), hn::Set(d, mean), hn::LoadU(d, d_out + i));
    hn::StoreU(hn::Mul(d_i, hn::Set(d, rstd)), d, d_x + i);
  });
}

// out += mimo_o[h,r] * norm(y_r) * silu(z * mimo_z[h,r]); y_r (P) is normed in place.
HWY_INLINE void gate(const MixerShape& s, const MixerWeights& w, int64_t h, int64_t r,
                     const float* z, float* y_r, float* out) {
  if (w.norm) {
    const float rstd = rstd_of(s.P, y_r, s.eps);
    const float* weight = w.norm + h * s.P;
    for_vectors(s.P, [&](auto d, int64_t i) HWY_ATTR {
      const auto normed = hn::Mul(hn::LoadU(d, y_r + i), hn::Set(d, rstd));
      hn::StoreU(hn::Mul(normed, hn::LoadU(d, weight + i)), d, y_r + i);
    });
  }
  const int64_t row = (h * s.R + r) * s.P;
  for_vectors(s.P, [&](auto d, int64_t i) HWY_ATTR {
    auto z_r = hn::LoadU(d, z + i);
    auto y = hn::LoadU(d, y_r + i);
    if (s.mimo) {
      z_r = hn::Mul(z_r, hn::LoadU(d, w.mimo_z + row + i));
      y = hn::Mul(y, hn::LoadU(d, w.mimo_o + row + i));
    }
    const auto silu = hn::Mul(z_r, sigmoid(d, z_r));
    const auto before = r == 0 ? hn::Zero(d) : hn::LoadU(d, out + i);
    hn::StoreU(hn::MulAdd(y, silu, before), d, out + i);
  });
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_MIXER_INL_H_
