#include "ops/rms_norm.h"

#include "core/check.h"

namespace mamba3 {

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const Check check("rms_norm", ctx);
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  check.tensor("residual", args.residual, {M, D});
  check.dense("weight", args.weight, {D});
  check.tensor("out", args.out, {M, D}, check.activation_types());
  check.disjoint("out", args.out, "residual", args.residual);
  if (args.delta.empty()) {
    check.that(args.residual_out.empty(), "residual_out is only written with a delta");
  } else {
    check.tensor("delta", args.delta, {M, D}, check.activation_types());
    check.tensor("residual_out", args.residual_out, {M, D});
    check.same_or_disjoint("residual_out", args.residual_out, "residual", args.residual);
    check.disjoint("residual_out", args.residual_out, "delta", args.delta);
    check.disjoint("out", args.out, "delta", args.delta);
    check.disjoint("out", args.out, "residual_out", args.residual_out);
  }
  if (!args.rstd.empty()) check.dense("rstd", args.rstd, {M});
  switch (ctx.device) {
    case Device::cpu:
      return cpu::rms_norm(ctx, args);
    case Device::cuda:
      return cuda::rms_norm(ctx, args);
  }
}

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  const Check check("rms_norm_backward", ctx);
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  check.tensor("residual", args.residual, {M, D});
  check.dense("weight", args.weight, {D});
  check.dense("rstd", args.rstd, {M});
  check.tensor("d_out", args.d_out, {M, D}, check.activation_types());
  check.tensor("d_residual", args.d_residual, {M, D});
  if (!args.d_residual_copy.empty()) {
    check.tensor("d_residual_copy", args.d_residual_copy, {M, D}, check.activation_types());
    check.disjoint("d_residual_copy", args.d_residual_copy, "d_residual", args.d_residual);
    check.disjoint("d_residual_copy", args.d_residual_copy, "residual", args.residual);
    check.disjoint("d_residual_copy", args.d_residual_copy, "d_out", args.d_out);
    check.disjoint("d_residual_copy", args.d_residual_copy, "weight", args.weight);
  }
  check.dense("d_weight", args.d_weight, {D});
  check.disjoint("d_residual", args.d_residual, "residual", args.residual);
  check.disjoint("d_residual", args.d_residual, "d_out", args.d_out);
  check.disjoint("d_weight", args.d_weight, "weight", args.weight);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::rms_norm_backward(ctx, args);
    case Device::cuda:
      return cuda::rms_norm_backward(ctx, args);
  }
}

}  // namespace mamba3
