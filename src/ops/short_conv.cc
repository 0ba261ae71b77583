#include "ops/short_conv.h"

#include <fmt/format.h>

#include "ops/packed.h"

namespace mamba3 {

namespace {

// Of the forward and of the backward alike. Returns the number of sequences.
template <typename Args>
int64_t check_conv(const Check& check, const Args& args) {
  const int64_t C = args.weight.dim(0), W = args.weight.dim(1);
  const int64_t B = args.in.dim(0), T = args.in.dim(1), X = args.in.dim(2);
  check.tensor("in", args.in, {B, T, X}, check.activation_types());
  check.dense("weight", args.weight, {C, W});
  check.that(W >= kNarrowestConv && W <= kWidestConv,
             fmt::format("the width is {}, want {} to {}", W, kNarrowestConv, kWidestConv));
  check.that(C > 0, "weight has no channels");
  check.that(
      args.first >= 0 && args.first + C <= X,
      fmt::format("channels {} to {} do not lie in {} columns", args.first, args.first + C, X));
  if (!args.bias.empty()) check.dense("bias", args.bias, {C});
  return check_packed(check, args.in, args.cu_seqlens);
}

}  // namespace

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const Check check("short_conv", ctx);
  const int64_t sequences = check_conv(check, args);
  const int64_t C = args.weight.dim(0), W = args.weight.dim(1);
  check.tensor("out", args.out, {args.in.dim(0), args.in.dim(1), args.in.dim(2)}, {args.in.dtype});
  check.disjoint("out", args.out, "in", args.in);
  if (!args.state.empty()) {
    const int64_t pool = args.state.inputs.dim(0);
    check.dense("state.inputs", args.state.inputs, {pool, W - 1, C});
    check.dense("state.rows", args.state.rows, {sequences}, {DType::i32});
    check.range("state.rows", args.state.rows, 0, pool);
  }
  switch (ctx.device) {
    case Device::cpu:
      return cpu::short_conv(ctx, args);
    case Device::cuda:
      return cuda::short_conv(ctx, args);
  }
}

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  const Check check("short_conv_backward", ctx);
  check_conv(check, args);
  const int64_t C = args.weight.dim(0), W = args.weight.dim(1);
  const int64_t B = args.in.dim(0), T = args.in.dim(1), X = args.in.dim(2);
  check.tensor("d_out", args.d_out, {B, T, X}, {args.in.dtype});
  check.tensor("d_in", args.d_in, {B, T, X}, {args.in.dtype});
  check.disjoint("d_in", args.d_in, "in", args.in);
  check.disjoint("d_in", args.d_in, "d_out", args.d_out);
  check.dense("d_weight", args.d_weight, {C, W});
  check.disjoint("d_weight", args.d_weight, "weight", args.weight);
  check.that(args.bias.empty() == args.d_bias.empty(), "d_bias goes with a bias: both, or none");
  if (!args.d_bias.empty()) {
    check.dense("d_bias", args.d_bias, {C});
    check.disjoint("d_bias", args.d_bias, "bias", args.bias);
  }
  switch (ctx.device) {
    case Device::cpu:
      return cpu::short_conv_backward(ctx, args);
    case Device::cuda:
      return cuda::short_conv_backward(ctx, args);
  }
}

}  // namespace mamba3
