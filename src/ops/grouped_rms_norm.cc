#include "ops/grouped_rms_norm.h"

#include <fmt/format.h>

#include "core/check.h"

namespace mamba3 {

namespace {

void check_groups(const Check& check, int64_t groups, int64_t C) {
  check.that(groups >= 1 && C % groups == 0,
             fmt::format("groups is {}, want a divisor of C = {}", groups, C));
}

}  // namespace

void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args) {
  const Check check("grouped_rms_norm", ctx);
  const int64_t M = args.x.dim(0), C = args.x.dim(1);
  check.tensor("x", args.x, {M, C}, check.activation_types());
  check_groups(check, args.groups, C);
  check.dense("weight", args.weight, {C});
  check.tensor("out", args.out, {M, C}, {args.x.dtype});
  check.same_or_disjoint("out", args.out, "x", args.x);
  check.disjoint("out", args.out, "weight", args.weight);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::grouped_rms_norm(ctx, args);
    case Device::cuda:
      return cuda::grouped_rms_norm(ctx, args);
  }
}

void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args) {
  const Check check("grouped_rms_norm_backward", ctx);
  const int64_t M = args.x.dim(0), C = args.x.dim(1);
  check.tensor("x", args.x, {M, C}, check.activation_types());
  check_groups(check, args.groups, C);
  check.dense("weight", args.weight, {C});
  check.tensor("d_out", args.d_out, {M, C}, {args.x.dtype});
  check.tensor("d_x", args.d_x, {M, C}, {args.x.dtype});
  check.dense("d_weight", args.d_weight, {C});
  check.same_or_disjoint("d_x", args.d_x, "d_out", args.d_out);
  check.disjoint("d_x", args.d_x, "x", args.x);
  check.disjoint("d_x", args.d_x, "weight", args.weight);
  check.disjoint("d_weight", args.d_weight, "weight", args.weight);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::grouped_rms_norm_backward(ctx, args);
    case Device::cuda:
      return cuda::grouped_rms_norm_backward(ctx, args);
  }
}

}  // namespace mamba3
