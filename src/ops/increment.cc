#include "ops/increment.h"

#include "core/check.h"

namespace mamba3 {

void increment(Context& ctx, const IncrementArgs& args) {
  const Check check("increment", ctx);
  check.dense("counters", args.counters, {args.counters.dim(0)}, {DType::i32, DType::i64});
  switch (ctx.device) {
    case Device::cpu:
      return cpu::increment(ctx, args);
    case Device::cuda:
      return cuda::increment(ctx, args);
  }
}

}  // namespace mamba3
