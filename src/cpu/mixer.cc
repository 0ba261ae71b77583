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

std::vector<MixerSequence> mixer_sequences(const View& proj, const View& cu_seqlens,
                                           const MixerState& state) {
  std::vector<MixerSequence> sequences;
  const int32_t* rows = state.empty() ? nullptr : state.rows.as<int32_t>();
  const auto add = [&](int64_t b, int64_t from, int64_t to) {
    const int64_t row = rows ? rows[sequences.size()] : -1;
    sequences.push_back({.token = b * proj.dim(1) + from, .T = to - from, .row = row});
  };
  if (cu_seqlens.empty()) {
    for (int64_t b = 0; b < proj.dim(0); ++b) add(b, 0, proj.dim(1));
  } else {
    const int32_t* cu = cu_seqlens.as<int32_t>();
    for (int64_t i = 0; i + 1 < cu_seqlens.dim(0); ++i) add(0, cu[i], cu[i + 1]);
  }
  return sequences;
}

ChunkScratch::ChunkScratch(const MixerShape& s, int64_t tokens, float* base) : Q(tokens) {
  SmallMatrices layout(base);
  const int64_t M = Q * s.R;
  q = layout.take(M, s.N);
  k = layout.take(M, s.N);
  k_t = layout.take(s.N, M);
  v = layout.take(M, s.P);
  v_scaled = layout.take(M, s.P);
  weights = layout.take(M, M);
  y = layout.take(M, s.P);
  state = layout.take(s.N, s.P);
  cosine = layout.take(Q, s.S);
  sine = layout.take(Q, s.S);
  angle = layout.take(1, s.S);
  c = layout.take(1, Q);
  c_low = layout.take(1, Q);
  scale = layout.take(1, Q);
  gamma = layout.take(1, Q);
  c_columns = layout.take(1, M);
  c_low_columns = layout.take(1, M);
  scale_columns = layout.take(1, M);
  mask = layout.take(1, M);
  floats = layout.floats();
}

float decay_act(DecayAct act, float x) {
  if (act == DecayAct::heavy_tail) return x >= 0 ? 1 + x : 1 / (1 - x);
  return x > 20 ? x : std::log1p(std::exp(x));
}

float decay_act_derivative(DecayAct act, float x) {
  if (act == DecayAct::heavy_tail) return x >= 0 ? 1 : 1 / ((1 - x) * (1 - x));
  return 1 / (1 + std::exp(-x));
}

}  // namespace mamba3::cpu
