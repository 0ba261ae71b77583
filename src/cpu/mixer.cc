#include "cpu/mixer.h"

#include <cmath>

namespace mamba3::cpu {

namespace {

const float* pointer(const View& view) {
  return view.empty() ? nullptr : view.as<float>();
}

}  // namespace

MixerWeights::MixerWeights(const MixerParams& p)
    : dt_bias(pointer(p.dt_bias)),
      A_log(pointer(p.A_log)),
      B_bias(pointer(p.B_bias)),
      C_bias(pointer(p.C_bias)),
      B_norm(pointer(p.B_norm)),
      C_norm(pointer(p.C_norm)),
      D(pointer(p.D)),
      mimo_x(pointer(p.mimo_x)),
      mimo_z(pointer(p.mimo_z)),
      mimo_o(pointer(p.mimo_o)),
      norm(pointer(p.norm)) {}

MixerTokens::MixerTokens(const MixerShape& s, int64_t tokens, ScratchScope& scratch)
    : dt(scratch.take<float>(tokens * s.H).data()),
      A_dt(scratch.take<float>(tokens * s.H).data()),
      lam(scratch.take<float>(tokens * s.H).data()),
      rstd_B(scratch.take<float>(tokens * s.R * s.G).data()),
      rstd_C(scratch.take<float>(tokens * s.R * s.G).data()),
      theta(scratch.take<float>(tokens * s.S).data()) {}

std::vector<MixerSequence> mixer_sequences(const View& proj, const View& cu_seqlens) {
  std::vector<MixerSequence> sequences;
  const auto add = [&](int64_t first_token, int64_t T) {
    const int64_t index = static_cast<int64_t>(sequences.size());
    sequences.push_back({.index = index, .token = first_token, .T = T});
  };
  if (cu_seqlens.empty()) {
    for (int64_t b = 0; b < proj.dim(0); ++b) add(b * proj.dim(1), proj.dim(1));
  } else {
    const int32_t* cu = cu_seqlens.as<int32_t>();
    for (int64_t i = 0; i + 1 < cu_seqlens.dim(0); ++i) add(cu[i], cu[i + 1] - cu[i]);
  }
  return sequences;
}

HeadState::HeadState(const MixerShape& s, const MixerState& state, int64_t sequence, int64_t h) {
  const int64_t row = state.rows.as<int32_t>()[sequence];
  angle = s.S > 0 ? state.angle.as<float>() + (row * s.H + h) * s.S : nullptr;
  ssm = state.ssm.as<float>() + (row * s.H + h) * s.P * s.N;
  v_prev = state.v_prev.as<float>() + (row * s.H + h) * s.P;
  k_prev_ = state.k_prev.as<float>() + (row * s.R * s.H + h) * s.N;
  k_stride_ = s.H * s.N;
}

ChunkScratch::ChunkScratch(const MixerShape& s, int64_t tokens, int64_t heads, float* base)
    : Q(tokens) {
  SmallMatrices layout(base);
  const int64_t M = Q * s.R;
  q = layout.take(M, s.N);
  k = layout.take(M, s.N);
  k_t = layout.take(s.N, M);
  v = layout.take(M, s.P);
  v_scaled = layout.take(M, s.P);
  weights = layout.take(M, M);
  y = layout.take(M, s.P);
  state = layout.take(heads * s.N, s.P);
  cosine = layout.take(Q, s.S);
  sine = layout.take(Q, s.S);
  angle = layout.take(heads, s.S);
  c = layout.take(1, Q);
  c_low = layout.take(1, Q);
  scale = layout.take(1, Q);
  gamma = layout.take(1, Q);
  c_columns = layout.take(1, M);
  c_low_columns = layout.take(1, M);
  scale_columns = layout.take(1, M);
  decay = layout.take(1, M);
  floats = layout.floats();
}

ChunkScratch ChunkScratch::of_head(int64_t i, int64_t N) const {
  ChunkScratch mine = *this;
  mine.state.data = state.row(i * N);
  mine.angle.data = angle.row(i);
  return mine;
}

float decay_act(DecayAct act, float x) {
  if (act == DecayAct::heavy_tail) return x >= 0 ? 1 + x : 1 / (1 - x);
  return x > 20 ? x : std::log1p(std::exp(x));
}

float decay_act_derivative(DecayAct act, float x) {
  if (act == DecayAct::heavy_tail) return x >= 0 ? 1 : 1 / ((1 - x) * (1 - x));
  return 1 / (1 + std::exp(-x));
}

float decay_rate(const MixerShape& s, const MixerWeights& w, const float* proj, int64_t h) {
  if (!s.has_dd_A()) return std::exp(w.A_log[h]);
  return std::fmax(decay_act(s.decay_act, proj[s.dd_A() + h]), s.A_floor);
}

float trapezoid(const MixerShape& s, const float* proj, int64_t h) {
  if (s.has_trap()) return 1 / (1 + std::exp(-proj[s.trap() + h]));
  return s.discretisation == Discretisation::half ? 0.5f : 1.0f;
}

}  // namespace mamba3::cpu
