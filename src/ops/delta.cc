#include "ops/delta.h"

#include "core/check.h"

namespace mamba3 {

void check_delta_shape(const Check& check, const DeltaShape& s) {
  check.that(s.H > 0 && s.K > 0 && s.V > 0, "H, K and V must be positive");
  check.that(s.K <= kWidestDeltaHead && s.V <= kWidestDeltaHead, "K and V must be at most 1024");
}

void check_delta_params(const Check& check, const DeltaShape& s, const DeltaParams& p) {
  check.dense("A_log", p.A_log, {s.H});
  check.dense("dt_bias", p.dt_bias, {s.H});
  check.dense("norm", p.norm, {s.V});
}

void check_delta_state(const Check& check, const DeltaShape& s, const DeltaState& state,
                       int64_t sequences) {
  const int64_t pool = state.delta.dim(0);
  check.dense("state.delta", state.delta, {pool, s.H, s.V, s.K});
  check.dense("state.rows", state.rows, {sequences}, {DType::i32});
  check.range("state.rows", state.rows, 0, pool);
}

}  // namespace mamba3
