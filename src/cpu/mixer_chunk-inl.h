// One chunk of the Mamba-3 scan of one head. Included once per instruction set.
//
// With c_t the sum of A dt from the chunk's first token to t, the rows i = (t, r) of a chunk give
//   y_i = exp(c_t) S q_i + sum_{j=(s,.)} W_ij v_j + D v_i
//   W_ij = (q_i . k_j) * { exp(c_t - c_s) scale_s, s < t;  gamma_t, s = t;  0, s > t }
//   gamma_t = lam_t dt_t,   scale_t = gamma_t + (1 - lam_{t+1}) dt_{t+1}
// where S already holds what its last token adds at the next one (the shifted half of the
// trapezoid, so that every key has one scale). The next chunk starts from
//   exp(c_Q) S + sum_j exp(c_Q - c_s) scale_s v_j k_j^T
// c is kept as the sum of two floats: a difference of two large sums must not lose a small decay.

#include "cpu/mixer-inl.h"
#include "hwy/cache_control.h"

#if defined(MAMBA3_CPU_MIXER_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_MIXER_CHUNK_INL_H_
#undef MAMBA3_CPU_MIXER_CHUNK_INL_H_
#else
#define MAMBA3_CPU_MIXER_CHUNK_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

struct Chunk {
  const MixerShape& s;
  const MixerWeights& w;
  const MixerTokens& terms;
  const View& proj_view;
  const MixerSequence& sequence;
  int64_t h;
  const ChunkScratch& m;

  int64_t first = 0;  // position of the chunk in the sequence
  int64_t Q = 0;      // its tokens
  int64_t M = 0;      // its rows, Q R

  int64_t token(int64_t i) const { return sequence.token + first + i; }
  const float* proj(int64_t i) const { return token_row(proj_view, token(i)); }
  // An (tokens, H) term of token i of the chunk; i may be Q if the sequence goes on.
  float term(const float* values, int64_t i) const { return values[token(i) * s.H + h]; }

  // What token `i` adds to the state on behalf of its predecessor; 0 past the end of the sequence.
  float carry(int64_t i) const {
    return first + i < sequence.T ? (1 - term(terms.lam, i)) * term(terms.dt, i) : 0;
  }

  HeadState head_state(const MixerState& state) const {
    return HeadState(s, state, sequence.index, h);
  }

  // S of the pool, plus what the first token adds for the last one of the call before.
  void begin_sequence(const MixerState& state) {
    for (int64_t n = 0; n < s.N; ++n) zero(m.state.stride, m.state.row(n));
    zero(s.S, m.angle.data);
    if (state.empty()) return;
    const HeadState initial = head_state(state);
    copy(s.S, initial.angle, m.angle.data);
    transpose(s.P, s.N, {initial.ssm, s.N}, m.state, s.P);
    for (int64_t r = 0; r < s.R; ++r) {
      value(s, w, h, r, initial.v_prev, m.v.data);
      for (int64_t n = 0; n < s.N; ++n) {
        add_scaled(s.P, carry(0) * initial.k_prev(r)[n], m.v.data, m.state.row(n));
      }
    }
  }

  void end_sequence(const MixerState& state) {
    if (state.empty()) return;
    const HeadState final = head_state(state);
    copy(s.S, m.angle.data, final.angle);
    transpose(s.N, s.P, m.state, {final.ssm, s.N}, s.N);
    for (int64_t r = 0; r < s.R; ++r) copy(s.N, m.k.row((Q - 1) * s.R + r), final.k_prev(r));
    copy(s.P, proj(Q - 1) + s.x() + h * s.P, final.v_prev);
  }

  // Rows of the projection are far apart, so the hardware does not see them coming.
  static constexpr int64_t kPrefetch = 2;  // tokens ahead
  void prefetch(const float* row) const {
    constexpr int64_t kLine = 16;
    const auto lines = [](const float* from, int64_t n) HWY_ATTR {
      for (int64_t i = 0; i < n; i += kLine) hwy::Prefetch(from + i);
    };
    lines(row + s.z() + h * s.P, s.P);
    lines(row + s.x() + h * s.P, s.P);
    for (int64_t r = 0; r < s.R; ++r) {
      const int64_t rg = (r * s.G + h / (s.H / s.G)) * s.N;
      lines(row + s.B() + rg, s.N);
      lines(row + s.C() + rg, s.N);
    }
  }

  // Sets the chunk to the tokens from `first` on: decays, angles, k, v and, if wanted, q.
  void prepare(int64_t first_token, bool with_q = true) {
    first = first_token;
    Q = HWY_MIN(m.Q, sequence.T - first);
    M = Q * s.R;
    const int64_t g = h / (s.H / s.G);
    double c = 0;
    for (int64_t i = 0; i < Q; ++i) {
      const float dt = term(terms.dt, i);
      c += static_cast<double>(term(terms.A_dt, i));
      m.c.data[i] = static_cast<float>(c);
      m.c_low.data[i] = static_cast<float>(c - static_cast<double>(m.c.data[i]));
      m.gamma.data[i] = term(terms.lam, i) * dt;
      m.scale.data[i] = m.gamma.data[i] + carry(i + 1);
      float* cosine = m.cosine.row(i);
      float* sine = m.sine.row(i);
      if (s.rope == Rope::standard) {
        float* end = i + 1 == Q ? m.angle.data : nullptr;
        standard_angle(s.S, i + 1, m.angle.data, end, cosine, sine);
      } else {
        advance_angle(s.S, terms.theta + token(i) * s.S, dt, m.angle.data, cosine, sine);
      }
      if (i + kPrefetch < Q) prefetch(proj(i + kPrefetch));
      const float* row = proj(i);
      for (int64_t r = 0; r < s.R; ++r) {
        const int64_t rg = r * s.G + g, hr = h * s.R + r, j = i * s.R + r;
        key_or_query(s, row + s.B() + rg * s.N, terms.rstd_B[token(i) * s.R * s.G + rg], w.B_norm,
                     w.B_bias, hr, cosine, sine, m.k.row(j));
        if (with_q) {
          key_or_query(s, row + s.C() + rg * s.N, terms.rstd_C[token(i) * s.R * s.G + rg], w.C_norm,
                       w.C_bias, hr, cosine, sine, m.q.row(j));
        }
        value(s, w, h, r, row + s.x() + h * s.P, m.v.row(j));
        m.c_columns.data[j] = m.c.data[i];
        m.c_low_columns.data[j] = m.c_low.data[i];
        m.scale_columns.data[j] = m.scale.data[i];
      }
    }
  }

  // exp(c_Q - c_t), for the last token Q of the chunk.
  float decay_to_end(int64_t t) const {
    return std::exp((m.c.data[Q - 1] - m.c.data[t]) + (m.c_low.data[Q - 1] - m.c_low.data[t]));
  }

  // decay_j = exp(c_t - c_s) for the columns j of the tokens s before t; 1 up to the vector's end.
  void decay_row(int64_t t) {
    const hn::ScalableTag<float> d;
    const auto c = hn::Set(d, m.c.data[t]), c_low = hn::Set(d, m.c_low.data[t]);
    for (int64_t j = 0; j < t * s.R; j += static_cast<int64_t>(hn::Lanes(d))) {
      const auto high = hn::Sub(c, hn::Load(d, m.c_columns.data + j));
      const auto low = hn::Sub(c_low, hn::Load(d, m.c_low_columns.data + j));
      hn::Store(hn::Exp(d, hn::Min(hn::Add(high, low), hn::Zero(d))), d, m.decay.data + j);
    }
  }

  // scores = q k^T, lower triangle.
  void scores(Matrix out) {
    transpose(M, s.N, m.k, m.k_t, m.k_t.stride);
    multiply<false, Causal::columns>(M, M, s.N, m.q, m.k_t, out, false, s.R);
  }

  // W from the scores; zero above the diagonal. `out` may be `in`.
  void weights(Matrix in, Matrix out) {
    for (int64_t t = 0; t < Q; ++t) {
      decay_row(t);
      const int64_t before = t * s.R, end = before + s.R;
      for (int64_t i = before; i < end; ++i) {
        weight_row(before, end, m.gamma.data[t], in.row(i), out.row(i));
      }
    }
  }
  // score * decay * scale before `before`, score * gamma up to `end`, then zero.
  void weight_row(int64_t before, int64_t end, float gamma, const float* score, float* weight) {
    const hn::ScalableTag<float> d;
    for (int64_t j = 0; j < M; j += static_cast<int64_t>(hn::Lanes(d))) {
      const auto earlier = hn::FirstN(d, static_cast<size_t>(HWY_MAX(0, before - j)));
      const auto seen = hn::FirstN(d, static_cast<size_t>(HWY_MAX(0, end - j)));
      const auto decay =
          hn::Mul(hn::Load(d, m.decay.data + j), hn::Load(d, m.scale_columns.data + j));
      const auto factor = hn::IfThenElse(earlier, decay, hn::Set(d, gamma));
      hn::Store(hn::IfThenElseZero(seen, hn::Mul(hn::Load(d, score + j), factor)), d, weight + j);
    }
  }

  // y (M, P), before norm and gate, from W.
  void outputs() {
    multiply<false>(M, s.P, s.N, m.q, m.state, m.y, false);
    const float D = w.D[h];
    for (int64_t i = 0; i < M; ++i) {
      float* y = m.y.row(i);
      scale(s.P, std::exp(m.c.data[i / s.R]), y, y);
      add_scaled(s.P, D, m.v.row(i), y);
    }
    multiply<false, Causal::inner>(M, s.P, M, m.weights, m.v, m.y, true, s.R);
  }

  // The state at the start of the next chunk.
  void advance_state() {
    for (int64_t j = 0; j < M; ++j) {
      scale(s.P, decay_to_end(j / s.R) * m.scale_columns.data[j], m.v.row(j), m.v_scaled.row(j));
    }
    const float decay = std::exp(m.c.data[Q - 1]);
    for (int64_t n = 0; n < s.N; ++n) scale(s.P, decay, m.state.row(n), m.state.row(n));
    multiply<true>(s.N, s.P, M, m.k, m.v_scaled, m.state, true);
  }
};

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_MIXER_CHUNK_INL_H_
