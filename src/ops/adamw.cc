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

}  // namespace

void adamw(Context& ctx, const AdamwArgs& args) {
  const Check check("adamw", ctx);
  check.that(not_negative(args.lr), "lr must be finite and not negative");
  check.that(in_unit_interval(args.beta1), "beta1 must be in [0, 1)");
  check.that(in_unit_interval(args.beta2), "beta2 must be in [0, 1)");
  check.that(not_negative(args.eps) && args.eps > 0, "eps must be finite and positive");
  check.that(not_negative(args.weight_decay), "weight_decay must be finite and not negative");
  check.that(not_negative(args.clip), "clip must be finite and not negative (0: no clipping)");
  check.that(args.step >= 1, "step counts from 1");
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
