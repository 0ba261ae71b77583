#include "ops/delta_step.h"

#include "core/check.h"

namespace mamba3 {

void delta_step(Context& ctx, const DeltaStepArgs& args) {
  const Check check("delta_step", ctx);
  const DeltaShape& s = args.shape;
  const int64_t B = args.proj.dim(0);
  check_delta_shape(check, s);
  check_delta_params(check, s, args.params);
  check.tensor("proj", args.proj, {B, s.d_proj()}, check.activation_types());
  check.tensor("y", args.y, {B, s.d_inner()}, {args.proj.dtype});
  check.disjoint("y", args.y, "proj", args.proj);
  check_delta_state(check, s, args.state, B);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::delta_step(ctx, args);
    case Device::cuda:
      return cuda::delta_step(ctx, args);
  }
}

}  // namespace mamba3
