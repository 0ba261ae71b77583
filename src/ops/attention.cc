#include "ops/attention.h"

#include <fmt/format.h>

#include "ops/packed.h"

namespace mamba3 {

namespace {

void check_heads(const Check& check, Device device, int64_t Hq, int64_t Hkv, int64_t d) {
  check.that(Hq > 0 && Hkv > 0 && d > 0, "Hq, Hkv and d must be positive");
  check.that(Hq % Hkv == 0, "Hkv must divide Hq");
  check.that(device == Device::cpu || d <= kWidestGpuHead,
             fmt::format("d is {}, and the GPU takes at most {}; use the CPU", d, kWidestGpuHead));
}

void check_cache(const Check& check, const AttentionArgs& args, int64_t B, int64_t T) {
  const AttentionCache& cache = args.cache;
  const int64_t pool = cache.k.dim(0), T_max = cache.k.dim(1);
  check.dense("cache.k", cache.k, {pool, T_max, args.Hkv, args.d}, check.activation_types());
  check.dense("cache.v", cache.v, {pool, T_max, args.Hkv, args.d}, {cache.k.dtype});
  check.dense("cache.rows", cache.rows, {B}, {DType::i32});
  check.range("cache.rows", cache.rows, 0, pool);
  check.dense("cache.lengths", cache.lengths, {B}, {DType::i32});
  check.that(T <= T_max, fmt::format("{} tokens do not fit a cache of {}", T, T_max));
  check.range("cache.lengths", cache.lengths, 0, T_max - T + 1);
  check.that(args.cu_seqlens.empty(), "cu_seqlens cannot be given together with a cache");
}

void check_forward(const Check& check, Device device, const AttentionArgs& args) {
  check_heads(check, device, args.Hq, args.Hkv, args.d);
  const int64_t B = args.qkv.dim(0), T = args.qkv.dim(1);
  check.tensor("qkv", args.qkv, {B, T, (args.Hq + 2 * args.Hkv) * args.d},
               check.activation_types());
  check.tensor("y", args.y, {B, T, args.Hq * args.d}, {args.qkv.dtype});
  check.disjoint("y", args.y, "qkv", args.qkv);
  if (!args.lse.empty()) check.dense("lse", args.lse, {B, args.Hq, T});
  check_packed(check, args.qkv, args.cu_seqlens);
  if (!args.cache.k.empty()) check_cache(check, args, B, T);
}

}  // namespace

void attention(Context& ctx, const AttentionArgs& args) {
  const Check check("attention", ctx);
  check_forward(check, ctx.device, args);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::attention(ctx, args);
    case Device::cuda:
      return cuda::attention(ctx, args);
  }
}

void attention_step(Context& ctx, const AttentionArgs& args) {
  const Check check("attention_step", ctx);
  check_forward(check, ctx.device, args);
  check.that(!args.cache.k.empty(), "cache.k is missing");
  check.that(args.qkv.dim(1) == 1,
             fmt::format("a step takes one token a sequence, got {}", args.qkv.dim(1)));
  check.that(args.lse.empty(), "a step has no backward and keeps no lse");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::attention_step(ctx, args);
    case Device::cuda:
      return cuda::attention_step(ctx, args);
  }
}

void attention_backward(Context& ctx, const AttentionBackwardArgs& args) {
  const Check check("attention_backward", ctx);
  check_heads(check, ctx.device, args.Hq, args.Hkv, args.d);
  const int64_t B = args.qkv.dim(0), T = args.qkv.dim(1);
  const int64_t columns = (args.Hq + 2 * args.Hkv) * args.d;
  const DType dtype = args.qkv.dtype;
  check.tensor("qkv", args.qkv, {B, T, columns}, check.activation_types());
  check.tensor("y", args.y, {B, T, args.Hq * args.d}, {dtype});
  check.dense("lse", args.lse, {B, args.Hq, T});
  check_packed(check, args.qkv, args.cu_seqlens);
  check.tensor("d_y", args.d_y, {B, T, args.Hq * args.d}, {dtype});
  check.tensor("d_qkv", args.d_qkv, {B, T, columns}, {dtype});
  check.disjoint("d_qkv", args.d_qkv, "qkv", args.qkv);
  check.disjoint("d_qkv", args.d_qkv, "d_y", args.d_y);
  check.disjoint("d_qkv", args.d_qkv, "y", args.y);
  switch (ctx.device) {
    case Device::cpu:
      return cpu::attention_backward(ctx, args);
    case Device::cuda:
      return cuda::attention_backward(ctx, args);
  }
}

}  // namespace mamba3
