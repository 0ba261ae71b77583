// One chunk of the gated delta rule of one head. Included once per instruction set.
//
// With c_t the sum of log alpha from the chunk's first token to t, S the state before the chunk and
// q, k normed, the state after token t is
//   S_t = exp(c_t) S + sum_{j<=t} exp(c_t - c_j) u_j k_j^T,   u_t = beta_t (v_t - alpha_t S_{t-1}
//   k_t)
// which is put in itself to give a lower triangular system for u, solved from the top, and then the
// outputs:
//   u_i = beta_i (v_i - ks_i + sum_{j<i} a_ij u_j),   ks_i = exp(c_i) S k_i,
//   o_i = exp(c_i) S q_i + sum_{j<=i} p_ij u_j,
//   a_ij = -exp(c_i - c_j) (k_i . k_j),   p_ij = exp(c_i - c_j) (q_i . k_j)
// (The paper's W and U, section 3.3, are the inverse of that system times the parts of its right
// side; S is known here when a chunk is taken, so the two need not be kept apart.) exp(c_i - c_j)
// is not split, which would overflow; and c is kept as the sum of two floats: a difference of two
// large sums must not lose a small decay.

#include "cpu/delta.h"
#include "cpu/mixer-inl.h"

#if defined(MAMBA3_CPU_DELTA_CHUNK_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MAMBA3_CPU_DELTA_CHUNK_INL_H_
#undef MAMBA3_CPU_DELTA_CHUNK_INL_H_
#else
#define MAMBA3_CPU_DELTA_CHUNK_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// out (n) = x over its length, times `factor`. Returns 1 / the length.
HWY_INLINE float unit_vector(int64_t n, const float* x, float factor, float* out) {
  const float rstd = 1 / std::sqrt(sum_of(n, x, x) + kDeltaNormEps);
  scale(n, factor * rstd, x, out);
  return rstd;
}

// log alpha and beta of one token and head, from its row of the projection.
HWY_INLINE float log_alpha(const DeltaShape& s, const DeltaWeights& w, const float* proj,
                           int64_t h) {
  const float raw = proj[s.a() + h] + w.dt_bias[h];
  return -std::exp(w.A_log[h]) * (raw > 20 ? raw : std::log1p(std::exp(raw)));
}
HWY_INLINE float beta_of(const DeltaShape& s, const float* proj, int64_t h) {
  return (s.negative ? 2.0f : 1.0f) / (1 + std::exp(-proj[s.b() + h]));
}

// y = rmsnorm(o) * norm * silu(z); o (V) is normed in place.
HWY_INLINE void delta_gate(const DeltaShape& s, const DeltaWeights& w, const float* z, float* o,
                           float* y) {
  const float rstd = rstd_of(s.V, o, s.eps);
  scale(s.V, rstd, o, o);
  for_vectors(s.V, [&](auto d, int64_t i) HWY_ATTR {
    const auto gate = hn::LoadU(d, z + i);
    const auto silu = hn::Mul(gate, sigmoid(d, gate));
    const auto weighted = hn::Mul(hn::LoadU(d, o + i), hn::LoadU(d, w.norm + i));
    hn::StoreU(hn::Mul(weighted, silu), d, y + i);
  });
}

struct DeltaChunk {
  const DeltaShape& s;
  const DeltaWeights& w;
  const View& proj_view;
  const MixerSequence& sequence;
  int64_t h;
  const DeltaScratch& m;

  int64_t first = 0;  // position of the chunk in the sequence
  int64_t Q = 0;      // its tokens

  int64_t token(int64_t t) const { return sequence.token + first + t; }
  const float* proj(int64_t t) const { return token_row(proj_view, token(t)); }
  float query_scale() const { return 1 / std::sqrt(static_cast<float>(s.K)); }

  void begin_sequence(const DeltaState& state) {
    for (int64_t i = 0; i < s.K; ++i) zero(m.state.stride, m.state.row(i));
    if (state.empty()) return;
    transpose(s.V, s.K, {delta_head_state(s, state, sequence.index, h), s.K}, m.state, s.V);
  }
  void end_sequence(const DeltaState& state) {
    if (state.empty()) return;
    transpose(s.K, s.V, m.state, {delta_head_state(s, state, sequence.index, h), s.K}, s.K);
  }

  // Sets the chunk to the tokens from `first_token` on: decays, k, v and, if wanted, q.
  void prepare(int64_t first_token, bool with_q) {
    first = first_token;
    Q = HWY_MIN(m.Q, sequence.T - first);
    double c = 0;
    for (int64_t t = 0; t < Q; ++t) {
      const float* row = proj(t);
      m.g.data[t] = log_alpha(s, w, row, h);
      m.beta.data[t] = beta_of(s, row, h);
      c += static_cast<double>(m.g.data[t]);
      m.c.data[t] = static_cast<float>(c);
      m.c_low.data[t] = static_cast<float>(c - static_cast<double>(m.c.data[t]));
      m.rstd_k.data[t] = unit_vector(s.K, row + s.k() + h * s.K, 1, m.k.row(t));
      if (with_q) {
        m.rstd_q.data[t] = unit_vector(s.K, row + s.q() + h * s.K, query_scale(), m.q.row(t));
      }
      copy(s.V, row + s.v() + h * s.V, m.v.row(t));
    }
    for (int64_t t = 0; t < Q; ++t) {
      m.from_start.data[t] = std::exp(m.c.data[t]);
      m.to_end.data[t] =
          std::exp((m.c.data[Q - 1] - m.c.data[t]) + (m.c_low.data[Q - 1] - m.c_low.data[t]));
    }
  }

  // decay_j = exp(c_t - c_j) for j <= t, and 1 up to the vector's end.
  void decay_row(int64_t t) {
    const hn::ScalableTag<float> d;
    const auto c = hn::Set(d, m.c.data[t]), c_low = hn::Set(d, m.c_low.data[t]);
    for (int64_t j = 0; j <= t; j += static_cast<int64_t>(hn::Lanes(d))) {
      const auto high = hn::Sub(c, hn::Load(d, m.c.data + j));
      const auto low = hn::Sub(c_low, hn::Load(d, m.c_low.data + j));
      hn::Store(hn::Exp(d, hn::Min(hn::Add(high, low), hn::Zero(d))), d, m.decay.data + j);
    }
  }

  // row_j = factor decay_j row_j for j < end, and zero behind.
  void decay_and_mask(float* row, int64_t end, float factor) {
    const hn::ScalableTag<float> d;
    for (int64_t j = 0; j < Q; j += static_cast<int64_t>(hn::Lanes(d))) {
      const auto seen = hn::FirstN(d, static_cast<size_t>(HWY_MAX(0, end - j)));
      const auto decay = hn::Mul(hn::Set(d, factor), hn::Load(d, m.decay.data + j));
      hn::Store(hn::IfThenElseZero(seen, hn::Mul(hn::Load(d, row + j), decay)), d, row + j);
    }
  }

  // a and, if wanted, p.
  void weights(bool with_q) {
    transpose(Q, s.K, m.k, m.k_t, m.k_t.stride);
    multiply<false, Causal::columns>(Q, Q, s.K, m.k, m.k_t, m.a, false);
    if (with_q) multiply<false, Causal::columns>(Q, Q, s.K, m.q, m.k_t, m.p, false);
    for (int64_t t = 0; t < Q; ++t) {
      decay_row(t);
      decay_and_mask(m.a.row(t), t, -1);
      if (with_q) decay_and_mask(m.p.row(t), t + 1, 1);
    }
  }

  // out (Q, V) = exp(c_t) S rows_t, for rows (Q, K).
  void of_state(Matrix rows, Matrix out) {
    multiply<false>(Q, s.V, s.K, rows, m.state, out, false);
    for (int64_t t = 0; t < Q; ++t) scale(s.V, m.from_start.data[t], out.row(t), out.row(t));
  }

  static constexpr int64_t kSolveRows = 8;  // taken at a time: what came before is one product

  // ks, then u.
  void updates() {
    of_state(m.k, m.ks);
    for (int64_t t = 0; t < Q; ++t) {
      copy(s.V, m.v.row(t), m.u.row(t));
      add_scaled(s.V, -1, m.ks.row(t), m.u.row(t));
    }
    for (int64_t begin = 0; begin < Q; begin += kSolveRows) {
      const int64_t end = HWY_MIN(Q, begin + kSolveRows);
      multiply<false>(end - begin, s.V, begin, {m.a.row(begin), m.a.stride}, m.u,
                      {m.u.row(begin), m.u.stride}, true);
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = begin; j < i; ++j) {
          add_scaled(s.V, m.a.row(i)[j], m.u.row(j), m.u.row(i));
        }
        scale(s.V, m.beta.data[i], m.u.row(i), m.u.row(i));
      }
    }
  }

  // o (Q, V), before norm and gate.
  void outputs() {
    of_state(m.q, m.o);
    multiply<false, Causal::inner>(Q, s.V, Q, m.p, m.u, m.o, true);
  }

  // The state at the start of the next chunk.
  void advance_state() {
    for (int64_t t = 0; t < Q; ++t) {
      scale(s.V, m.to_end.data[t], m.u.row(t), m.u_scaled.row(t));
    }
    const float decay = m.from_start.data[Q - 1];
    for (int64_t i = 0; i < s.K; ++i) scale(s.V, decay, m.state.row(i), m.state.row(i));
    multiply<true>(s.K, s.V, Q, m.k, m.u_scaled, m.state, true);
  }
};

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // MAMBA3_CPU_DELTA_CHUNK_INL_H_
