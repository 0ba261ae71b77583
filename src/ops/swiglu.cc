#include "ops/swiglu.h"

#include "core/check.h"

namespace mamba3 {

void check_swiglu(const Context& ctx, const SwigluArgs& args) {
  const Check check("swiglu", ctx);
  const int64_t M = args.out.dim(0), F = args.out.dim(1);
  check.tensor("out", args.out, {M, F}, check.activation_types());
  check.tensor("y_gate", args.y_gate, {M, 2 * F}, {args.out.dtype});
  check.disjoint("out", args.out, "y_gate", args.y_gate);
}

void swiglu(Context& ctx, const SwigluArgs& args) {
  check_swiglu(ctx, args);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::swiglu(ctx, args);
    case Device::cuda:
      return cuda::swiglu(ctx, args);
  }
}

void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args) {
  const Check check("swiglu_backward", ctx);
  const int64_t M = args.d_out.dim(0), F = args.d_out.dim(1);
  check.tensor("d_out", args.d_out, {M, F}, check.activation_types());
  check.tensor("y_gate", args.y_gate, {M, 2 * F}, {args.d_out.dtype});
  check.tensor("d_y_gate", args.d_y_gate, {M, 2 * F}, {args.d_out.dtype});
  check.same_or_disjoint("d_y_gate", args.d_y_gate, "y_gate", args.y_gate);
  check.disjoint("d_y_gate", args.d_y_gate, "d_out", args.d_out);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::swiglu_backward(ctx, args);
    case Device::cuda:
      return cuda::swiglu_backward(ctx, args);
  }
}

}  // namespace mamba3
