#include "ops/linear_swiglu.h"

#include "ops/linear.h"
#include "ops/swiglu.h"

namespace mamba3 {

void linear_swiglu(Context& ctx, const LinearSwigluArgs& args) {
  const LinearArgs product{.x = args.x, .weight = args.weight, .y = args.y_gate};
  const SwigluArgs activation{.y_gate = args.y_gate, .out = args.out};
  if (!args.keeps && ctx.device == Device::cuda) {
    check_linear(ctx, product);
    check_swiglu(ctx, activation);
    if (cuda::linear_swiglu(ctx, args)) return;
  }
  linear(ctx, product);
  swiglu(ctx, activation);
}

}  // namespace mamba3
