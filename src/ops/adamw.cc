#include "ops/adamw.h"

#include <cmath>

#include "core/check.h"
#include "core/error.h"

namespace mamba3 {

namespace {

// A dense tensor of any rank as (n).
View flat(const View& view) {
  View line = view;
  line.rank = 1;
  line.dims = {view.size()};
  line.strides = {1};
  return line;
}

void check_tensor(const Check& check, size_t index, const AdamwTensor& tensor) {
  const int64_t n = tensor.param.size();
  const auto dense = [&](const char* part, const View& view, DType dtype = DType::f32) {
    const std::string name = fmt::format("tensors[{}].{}", index, part);
    check.that(view.contiguous(), name + " must be contiguous");
    check.dense(name, flat(view), {n}, {dtype});
  };
  dense("param", tensor.param);
  dense("grad", tensor.grad);
  dense("m", tensor.m);
  dense("v", tensor.v);
  if (!tensor.low.empty()) dense("low", tensor.low, DType::bf16);
}

bool in_unit_interval(float value) {
  return value >= 0 && value < 1;
}

bool not_negative(float value) {
  return value >= 0 && std::isfinite(value);
}

void require(bool holds, std::string_view message) {
  if (!holds) input_error("[adamw] {}", message);
}

}  // namespace

AdamwNumbers adamw_numbers(const AdamwArgs& args) {
  require(not_negative(args.lr), "lr must be finite and not negative");
  require(in_unit_interval(args.beta1), "beta1 must be in [0, 1)");
  require(in_unit_interval(args.beta2), "beta2 must be in [0, 1)");
  require(not_negative(args.weight_decay), "weight_decay must be finite and not negative");
  require(args.step >= 1, "step counts from 1");
  const auto unbias = [&](float beta) {
    return static_cast<float>(
        1 / (1 - std::pow(static_cast<double>(beta), static_cast<double>(args.step))));
  };
  return {.lr = args.lr,
          .decay = args.lr * args.weight_decay,
          .unbias1 = unbias(args.beta1),
          .unbias2 = unbias(args.beta2)};
}

void adamw(Context& ctx, const AdamwArgs& args) {
  adamw_numbers(args);  // for its checks
  require(not_negative(args.eps) && args.eps > 0, "eps must be finite and positive");
  require(not_negative(args.clip), "clip must be finite and not negative (0: no clipping)");
  const Check check("adamw", ctx);
  if (!args.numbers.empty()) check.dense("numbers", args.numbers, {4});
  if (!args.loss.empty()) check.dense("loss", args.loss, {1}, {DType::f64});
  check.dense("grad_norm", args.grad_norm, {1});
  for (size_t i = 0; i < args.tensors.size(); ++i) check_tensor(check, i, args.tensors[i]);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::adamw(ctx, args);
    case Device::cuda:
      return cuda::adamw(ctx, args);
  }
}

}  // namespace mamba3
