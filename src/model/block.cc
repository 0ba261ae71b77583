#include "model/block.h"

#include "core/error.h"
#include "ops/linear.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/swiglu.h"

namespace mamba3 {

namespace {

// (M, X) as (B, T, X); rows may be strided.
View by_token(const View& rows, int64_t B, int64_t T) {
  View tokens = make_view(rows.data, rows.dtype, {B, T, rows.dim(1)}, rows.device);
  tokens.strides = {T * rows.stride(0), rows.stride(0), 1};
  return tokens;
}

// The stream's pending sum and its norm.
void norm_stream(Context& ctx, const Config& config, const Stream& in, const View& weight,
                 const View& residual, const View& rstd, const View& normed) {
  rms_norm(ctx, {.residual = in.residual,
                 .delta = in.delta,
                 .weight = weight,
                 .residual_out = in.delta.empty() ? View{} : residual,
                 .out = normed,
                 .rstd = rstd,
                 .eps = config.eps});
}

void mamba_forward(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  const MixerShape& shape = args.config.mixer;
  const MixerParams& params = args.weights.mixer;
  if (args.state != nullptr && args.T == 1 && args.cu_seqlens.empty()) {
    mixer_step(
        ctx,
        {.shape = shape, .params = params, .proj = a.proj, .y = a.y, .state = args.state->mixer});
  } else {
    mixer_scan(ctx, {.shape = shape,
                     .params = params,
                     .proj = by_token(a.proj, args.B, args.T),
                     .y = by_token(a.y, args.B, args.T),
                     .cu_seqlens = args.cu_seqlens,
                     .state = args.state != nullptr ? args.state->mixer : MixerState{}});
  }
}

// Packed sequences that continue, one by one.
void attention_apart(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  const AttentionConfig& c = args.config.attention;
  const std::span<const int32_t> cu = args.host_cu_seqlens;
  if (std::ssize(cu) != args.cu_seqlens.dim(0))
    error("[model] attention over packed sequences with a state needs cu_seqlens in host memory");
  for (int64_t i = 0; i + 1 < std::ssize(cu); ++i) {
    const int64_t begin = cu[static_cast<size_t>(i)], end = cu[static_cast<size_t>(i + 1)];
    if (begin == end) continue;
    AttentionCache cache = args.state->attention;
    cache.rows = cache.rows.slice(0, i, i + 1);
    cache.lengths = cache.lengths.slice(0, i, i + 1);
    attention(ctx, {.Hq = c.Hq,
                    .Hkv = c.Hkv,
                    .d = c.d,
                    .qkv = by_token(a.proj.slice(0, begin, end), 1, end - begin),
                    .y = by_token(a.y.slice(0, begin, end), 1, end - begin),
                    .cache = cache});
  }
}

void attention_forward(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  const AttentionConfig& c = args.config.attention;
  if (args.state != nullptr && !args.cu_seqlens.empty()) return attention_apart(ctx, args);
  const AttentionArgs attention_args{
      .Hq = c.Hq,
      .Hkv = c.Hkv,
      .d = c.d,
      .qkv = by_token(a.proj, args.B, args.T),
      .y = by_token(a.y, args.B, args.T),
      .lse = a.lse.empty() ? View{} : a.lse.reshape({args.B, c.Hq, args.T}),
      .cu_seqlens = args.cu_seqlens,
      .cache = args.state != nullptr ? args.state->attention : AttentionCache{}};
  if (args.state != nullptr && args.T == 1) {
    attention_step(ctx, attention_args);
  } else {
    attention(ctx, attention_args);
  }
}

// proj -> y
void mixer_forward(Context& ctx, const BlockForwardArgs& args) {
  if (args.config.is_attention(args.layer)) {
    attention_forward(ctx, args);
  } else {
    mamba_forward(ctx, args);
  }
}

// d_y -> d_proj
void mixer_backward(Context& ctx, const BlockBackwardArgs& args) {
  const BlockActivations& a = args.activations;
  const View proj = by_token(a.proj, args.B, args.T);
  const View d_y = by_token(a.d_y, args.B, args.T);
  const View d_proj = by_token(a.d_proj, args.B, args.T);
  if (args.config.is_attention(args.layer)) {
    const AttentionConfig& c = args.config.attention;
    attention_backward(ctx, {.Hq = c.Hq,
                             .Hkv = c.Hkv,
                             .d = c.d,
                             .qkv = proj,
                             .y = by_token(a.y, args.B, args.T),
                             .lse = a.lse.reshape({args.B, c.Hq, args.T}),
                             .cu_seqlens = args.cu_seqlens,
                             .d_y = d_y,
                             .d_qkv = d_proj});
  } else {
    mixer_scan_backward(ctx, {.shape = args.config.mixer,
                              .params = args.weights.mixer,
                              .proj = proj,
                              .cu_seqlens = args.cu_seqlens,
                              .d_y = d_y,
                              .d_proj = d_proj,
                              .d_params = args.gradients.mixer});
  }
}

void mlp_backward(Context& ctx, const BlockBackwardArgs& args, const StreamGradient& d_stream) {
  const BlockWeights& w = args.weights;
  const BlockWeights& g = args.gradients;
  const BlockActivations& a = args.activations;
  linear_backward(
      ctx,
      {.x = a.act, .weight = w.fc2, .d_y = d_stream.operand(), .d_x = a.d_act, .d_weight = g.fc2});
  swiglu_backward(ctx, {.y_gate = a.fc1, .d_out = a.d_act, .d_y_gate = a.fc1});
  linear_backward(
      ctx, {.x = a.normed2, .weight = w.fc1, .d_y = a.fc1, .d_x = a.d_normed, .d_weight = g.fc1});
  rms_norm_backward(ctx, {.residual = a.residual2,
                          .weight = w.norm2,
                          .rstd = a.rstd2,
                          .d_out = a.d_normed,
                          .d_residual = d_stream.total,
                          .d_residual_copy = d_stream.copy,
                          .d_weight = g.norm2});
}

}  // namespace

BlockWeights resolve_block_weights(const Config& config, const NamedTensors& tensors,
                                   int64_t layer) {
  const auto view = [&](std::string_view what) {
    return tensors.at(fmt::format("backbone.layers.{}.{}", layer, what));
  };
  BlockWeights w;
  w.norm = view("norm.weight");
  w.in_proj = view("mixer.in_proj.weight");
  w.out_proj = view("mixer.out_proj.weight");
  if (config.is_attention(layer)) {
    if (config.attention.qkv_bias) w.in_proj_bias = view("mixer.in_proj.bias");
    if (config.attention.out_bias) w.out_proj_bias = view("mixer.out_proj.bias");
  } else {
    w.mixer.dt_bias = view("mixer.dt_bias");
    w.mixer.B_bias = view("mixer.B_bias");
    w.mixer.C_bias = view("mixer.C_bias");
    w.mixer.B_norm = view("mixer.B_norm.weight");
    w.mixer.C_norm = view("mixer.C_norm.weight");
    w.mixer.D = view("mixer.D");
    if (config.mixer.mimo) {
      w.mixer.mimo_x = view("mixer.mimo_x");
      w.mixer.mimo_z = view("mixer.mimo_z");
      w.mixer.mimo_o = view("mixer.mimo_o");
    }
    if (config.mixer.out_norm) {
      w.mixer.norm = view("mixer.norm.weight").reshape({config.mixer.H, config.mixer.P});
    }
  }
  if (config.d_mlp > 0) {
    w.norm2 = view("norm2.weight");
    w.fc1 = view("mlp.fc1.weight");
    w.fc2 = view("mlp.fc2.weight");
  }
  return w;
}

Stream block_forward(Context& ctx, const BlockForwardArgs& args, const Stream& in) {
  const BlockWeights& w = args.weights;
  const BlockActivations& a = args.activations;
  norm_stream(ctx, args.config, in, w.norm, a.residual, a.rstd, a.normed);
  linear(ctx, {.x = a.normed, .weight = w.in_proj, .bias = w.in_proj_bias, .y = a.proj});
  mixer_forward(ctx, args);
  linear(ctx, {.x = a.y, .weight = w.out_proj, .bias = w.out_proj_bias, .y = a.delta});
  if (args.config.d_mlp == 0) return {a.residual, a.delta};
  norm_stream(ctx, args.config, {a.residual, a.delta}, w.norm2, a.residual2, a.rstd2, a.normed2);
  linear(ctx, {.x = a.normed2, .weight = w.fc1, .y = a.fc1});
  swiglu(ctx, {.y_gate = a.fc1, .out = a.act});
  linear(ctx, {.x = a.act, .weight = w.fc2, .y = a.delta});
  return {a.residual2, a.delta};
}

void block_backward(Context& ctx, const BlockBackwardArgs& args, const StreamGradient& d_stream) {
  const BlockWeights& w = args.weights;
  const BlockWeights& g = args.gradients;
  const BlockActivations& a = args.activations;
  if (args.config.d_mlp > 0) mlp_backward(ctx, args, d_stream);
  // The gradient of a bias is a sum, not a product: of the total.
  const bool bias = !g.out_proj_bias.empty();
  linear_backward(ctx, {.x = a.y,
                        .weight = w.out_proj,
                        .d_y = bias ? d_stream.total : d_stream.operand(),
                        .d_x = a.d_y,
                        .d_weight = g.out_proj,
                        .d_bias = g.out_proj_bias});
  mixer_backward(ctx, args);
  linear_backward(ctx, {.x = a.normed,
                        .weight = w.in_proj,
                        .d_y = a.d_proj,
                        .d_x = a.d_normed,
                        .d_weight = g.in_proj,
                        .d_bias = g.in_proj_bias});
  rms_norm_backward(ctx, {.residual = a.residual,
                          .weight = w.norm,
                          .rstd = a.rstd,
                          .d_out = a.d_normed,
                          .d_residual = d_stream.total,
                          .d_residual_copy = d_stream.copy,
                          .d_weight = g.norm});
}

}  // namespace mamba3
