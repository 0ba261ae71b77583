#include "ops/mixer.h"

#include <cmath>

#include "core/check.h"

namespace mamba3 {

float standard_turn(int64_t i, int64_t S) {
  return static_cast<float>(std::pow(10000.0, -static_cast<double>(i) / static_cast<double>(S)));
}

void check_mixer_shape(const Check& check, const MixerShape& s) {
  check.that(s.H > 0 && s.P > 0 && s.N > 0 && s.G > 0 && s.R > 0,
             "H, P, N, G and R must be positive");
  check.that(s.H % s.G == 0, "G must divide H");
  check.that(s.S >= 0 && 2 * s.S <= s.N, "S must be between 0 and N/2");
  check.that(s.rope_pairs == RopePairs::neighbours || s.N % 2 == 0,
             "rotating halves needs an even N");
  check.that(s.mimo || s.R == 1, "R must be 1 unless mimo is set");
}

void check_mixer_params(const Check& check, const MixerShape& s, const MixerParams& p) {
  check.dense("dt_bias", p.dt_bias, {s.H});
  if (!s.has_dd_A()) check.dense("A_log", p.A_log, {s.H});
  if (s.bc_bias) {
    check.dense("B_bias", p.B_bias, {s.H, s.R, s.N});
    check.dense("C_bias", p.C_bias, {s.H, s.R, s.N});
  }
  if (s.bc_norm) {
    check.dense("B_norm", p.B_norm, {s.N});
    check.dense("C_norm", p.C_norm, {s.N});
  }
  check.dense("D", p.D, {s.H});
  if (s.mimo) {
    check.dense("mimo_x", p.mimo_x, {s.H, s.R, s.P});
    check.dense("mimo_z", p.mimo_z, {s.H, s.R, s.P});
    check.dense("mimo_o", p.mimo_o, {s.H, s.R, s.P});
  }
  if (s.out_norm) check.dense("norm", p.norm, {s.H, s.P});
}

void check_mixer_state(const Check& check, const MixerShape& s, const MixerState& state,
                       int64_t sequences) {
  const int64_t pool = state.ssm.dim(0);
  if (s.S > 0) check.dense("state.angle", state.angle, {pool, s.H, s.S});
  check.dense("state.ssm", state.ssm, {pool, s.H, s.P, s.N}, check.activation_types());
  check.dense("state.k_prev", state.k_prev, {pool, s.R, s.H, s.N});
  check.dense("state.v_prev", state.v_prev, {pool, s.H, s.P});
  check.dense("state.rows", state.rows, {sequences}, {DType::i32});
  check.range("state.rows", state.rows, 0, pool);
}

}  // namespace mamba3
