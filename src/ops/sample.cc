#include "ops/sample.h"

#include <cmath>

#include "core/check.h"

namespace mamba3 {

void sample(Context& ctx, const SampleArgs& args) {
  const Check check("sample", ctx);
  const int64_t B = args.logits.dim(0), V = args.logits.dim(1);
  check.tensor("logits", args.logits, {B, V});
  check.that(args.vocab >= 1 && args.vocab <= V, "vocab must be between 1 and V");
  check.dense("out", args.out, {B}, {DType::i32});
  if (!args.history.empty()) {
    check.dense("history", args.history, {B, args.history.dim(1)}, {DType::i32});
    check.range("history", args.history, -1, args.vocab);
  }
  if (!args.step.empty()) {
    check.dense("step", args.step, {args.step.dim(0) == 1 ? 1 : B}, {DType::i64});
  }
  if (!args.rows.empty()) check.dense("rows", args.rows, {B}, {DType::i32});
  check.that(args.temperature >= 0 && std::isfinite(args.temperature),
             "temperature must be finite and not negative (0: the largest logit)");
  check.that(args.top_k >= 0, "top_k must not be negative (0: off)");
  check.that(args.top_p > 0 && args.top_p <= 1, "top_p must be in (0, 1] (1: off)");
  check.that(args.min_p >= 0 && args.min_p <= 1, "min_p must be in [0, 1] (0: off)");
  check.that(args.repeat_penalty > 0 && std::isfinite(args.repeat_penalty),
             "repeat_penalty must be finite and positive (1: off)");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::sample(ctx, args);
    case Device::cuda:
      return cuda::sample(ctx, args);
  }
}

}  // namespace mamba3
