#include "ops/mixer_step.h"

#include "core/check.h"

namespace mamba3 {

void mixer_step(Context& ctx, const MixerStepArgs& args) {
  const Check check("mixer_step", ctx);
  const MixerShape& s = args.shape;
  const int64_t B = args.proj.dim(0);
  check_mixer_shape(check, s);
  check_mixer_params(check, s, args.params);
  check.tensor("proj", args.proj, {B, s.d_proj()}, check.activation_types());
  check.tensor("y", args.y, {B, s.d_inner()}, {args.proj.dtype});
  check.disjoint("y", args.y, "proj", args.proj);
  check_mixer_state(check, s, args.state, B);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::mixer_step(ctx, args);
    case Device::cuda:
      return cuda::mixer_step(ctx, args);
  }
}

}  // namespace mamba3
