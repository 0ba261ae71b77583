#include "ops/add_sum.h"

#include "core/check.h"

namespace mamba3 {

void add_sum(Context& ctx, const AddSumArgs& args) {
  const Check check("add_sum", ctx);
  check.dense("values", args.values, {args.values.dim(0)});
  check.dense("total", args.total, {1}, {DType::f64});
  switch (ctx.device) {
    case Device::cpu:
      return cpu::add_sum(ctx, args);
    case Device::cuda:
      return cuda::add_sum(ctx, args);
  }
}

}  // namespace mamba3
