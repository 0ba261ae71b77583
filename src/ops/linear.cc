#include "ops/linear.h"

#include <fmt/format.h>

#include "core/check.h"

namespace mamba3 {

namespace {

constexpr std::initializer_list<DType> kCpuWeights = {DType::f32, DType::bf16, DType::f16};

void check_weight(const Check& check, const Context& ctx, const View& weight, int64_t N,
                  int64_t K) {
  check.dense("weight", weight, {N, K},
              ctx.device == Device::cpu ? kCpuWeights : check.activation_types());
}

void check_operands(const Check& check, const Context& ctx, const View& x, const View& weight) {
  const bool agree = ctx.device == Device::cpu || x.dtype == weight.dtype;
  check.that(agree, "x and weight must have the same dtype");
}

// A matrix whose rows may be strided, but not overlap.
void check_rows(const Check& check, std::string_view name, const View& view, int64_t rows,
                int64_t columns) {
  check.tensor(name, view, {rows, columns}, check.activation_types());
  check.that(rows <= 1 || view.stride(0) >= columns,
             fmt::format("rows of {} overlap: stride {}, want at least {}", name, view.stride(0),
                         columns));
}

}  // namespace

void check_linear(const Context& ctx, const LinearArgs& args) {
  const Check check("linear", ctx);
  const int64_t M = args.x.dim(0), N = args.weight.dim(0), K = args.weight.dim(1);
  check_rows(check, "x", args.x, M, K);
  check_weight(check, ctx, args.weight, N, K);
  check_operands(check, ctx, args.x, args.weight);
  if (!args.bias.empty()) check.dense("bias", args.bias, {N});
  check_rows(check, "y", args.y, M, N);
  check.disjoint("y", args.y, "x", args.x);
  check.disjoint("y", args.y, "weight", args.weight);
  check.disjoint("y", args.y, "bias", args.bias);
}

void linear(Context& ctx, const LinearArgs& args) {
  check_linear(ctx, args);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::linear(ctx, args);
    case Device::cuda:
      return cuda::linear(ctx, args);
  }
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const Check check("linear_backward", ctx);
  const int64_t M = args.d_y.dim(0), N = args.d_y.dim(1);
  check_rows(check, "d_y", args.d_y, M, N);
  if (!args.d_x.empty()) {
    const int64_t K = args.weight.dim(1);
    check_weight(check, ctx, args.weight, N, K);
    check_rows(check, "d_x", args.d_x, M, K);
    check.disjoint("d_x", args.d_x, "d_y", args.d_y);
    check.disjoint("d_x", args.d_x, "weight", args.weight);
    check.disjoint("d_x", args.d_x, "x", args.x);
  }
  if (!args.d_weight.empty()) {
    const int64_t K = args.x.dim(1);
    check_rows(check, "x", args.x, M, K);
    check.dense("d_weight", args.d_weight, {N, K});
    check.disjoint("d_weight", args.d_weight, "d_y", args.d_y);
    check.disjoint("d_weight", args.d_weight, "x", args.x);
  }
  if (!args.d_x.empty() && !args.d_weight.empty()) check_operands(check, ctx, args.x, args.weight);
  if (!args.d_bias.empty()) {
    check.dense("d_bias", args.d_bias, {N});
    check.disjoint("d_bias", args.d_bias, "d_y", args.d_y);
  }
  switch (ctx.device) {
    case Device::cpu:
      return cpu::linear_backward(ctx, args);
    case Device::cuda:
      return cuda::linear_backward(ctx, args);
  }
}

}  // namespace mamba3
