#include "ops/cross_entropy.h"

#include <algorithm>

#include "core/check.h"

namespace mamba3 {

int64_t cross_entropy_slice(int64_t M, int64_t bytes_of_token, int64_t slice_bytes) {
  constexpr int64_t kStep = kCrossEntropyStep;
  const int64_t most = std::max(slice_bytes / bytes_of_token / kStep, int64_t{1}) * kStep;
  const int64_t slices = (M + most - 1) / most;
  if (slices <= 1) return M;
  return (M + slices * kStep - 1) / (slices * kStep) * kStep;
}

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  const Check check("cross_entropy", ctx);
  const int64_t M = args.hidden.dim(0), D = args.hidden.dim(1), V = args.weight.dim(0);
  check.tensor("hidden", args.hidden, {M, D}, check.activation_types());
  if (ctx.device == Device::cpu) {
    check.dense("weight", args.weight, {V, D}, {DType::f32, DType::bf16, DType::f16});
  } else {
    check.dense("weight", args.weight, {V, D}, {args.hidden.dtype});
  }
  check.that(args.vocab >= 1 && args.vocab <= V, "vocab must be between 1 and the rows of weight");
  check.dense("targets", args.targets, {M}, {DType::i32});
  check.range("targets", args.targets, -1, args.vocab);
  check.dense("nll", args.nll, {M});
  if (!args.lse.empty()) check.dense("lse", args.lse, {M});
  if (!args.d_hidden.empty())
    check.tensor("d_hidden", args.d_hidden, {M, D}, check.activation_types());
  if (!args.d_weight.empty()) check.dense("d_weight", args.d_weight, {V, D});
  if (!args.scale.empty()) check.dense("scale", args.scale, {1});
  check.disjoint("d_hidden", args.d_hidden, "hidden", args.hidden);
  check.disjoint("d_weight", args.d_weight, "weight", args.weight);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::cross_entropy(ctx, args);
    case Device::cuda:
      return cuda::cross_entropy(ctx, args);
  }
}

}  // namespace mamba3
