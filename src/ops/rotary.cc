#include "ops/rotary.h"

#include <fmt/format.h>

#include <limits>

#include "ops/packed.h"

namespace mamba3 {

void rotary(Context& ctx, const RotaryArgs& args) {
  const Check check("rotary", ctx);
  const int64_t B = args.x.dim(0), T = args.x.dim(1), columns = args.x.dim(2);
  check.tensor("x", args.x, {B, T, columns}, check.activation_types());
  check.that(args.d > 0 && columns % args.d == 0,
             fmt::format("{} columns of x are no heads of {}", columns, args.d));
  check.that(args.dims >= 2 && args.dims <= args.d && args.dims % 2 == 0,
             fmt::format("dims is {}, want an even number from 2 to {}", args.dims, args.d));
  check.that(args.base > 0, fmt::format("base is {}, want a positive number", args.base));
  const int64_t sequences = check_packed(check, args.x, args.cu_seqlens);
  if (!args.start.empty()) {
    check.dense("start", args.start, {sequences}, {DType::i32});
    check.range("start", args.start, 0, int64_t{std::numeric_limits<int32_t>::max()} + 1);
  }
  switch (ctx.device) {
    case Device::cpu:
      return cpu::rotary(ctx, args);
    case Device::cuda:
      return cuda::rotary(ctx, args);
  }
}

}  // namespace mamba3
