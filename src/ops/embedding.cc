#include "ops/embedding.h"

#include "core/check.h"

namespace mamba3 {

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const Check check("embedding", ctx);
  const int64_t M = args.ids.dim(0), V = args.weight.dim(0), D = args.weight.dim(1);
  check.dense("ids", args.ids, {M}, {DType::i32});
  check.dense("weight", args.weight, {V, D}, {DType::f32, DType::bf16, DType::f16});
  check.dense("out", args.out, {M, D});
  check.disjoint("out", args.out, "weight", args.weight);
  check.range("ids", args.ids, 0, V);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::embedding(ctx, args);
    case Device::cuda:
      return cuda::embedding(ctx, args);
  }
}

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  const Check check("embedding_backward", ctx);
  const int64_t M = args.ids.dim(0), V = args.d_weight.dim(0), D = args.d_weight.dim(1);
  check.dense("ids", args.ids, {M}, {DType::i32});
  check.dense("d_weight", args.d_weight, {V, D});
  check.dense("d_out", args.d_out, {M, D});
  check.disjoint("d_weight", args.d_weight, "d_out", args.d_out);
  check.range("ids", args.ids, 0, V);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::embedding_backward(ctx, args);
    case Device::cuda:
      return cuda::embedding_backward(ctx, args);
  }
}

}  // namespace mamba3
