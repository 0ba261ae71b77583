#include "model/block.h"

#include "core/error.h"
#include "ops/delta_scan.h"
#include "ops/delta_step.h"
#include "ops/grouped_rms_norm.h"
#include "ops/linear.h"
#include "ops/linear_swiglu.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/rotary.h"
#include "ops/short_conv.h"
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

bool is_step(const BlockForwardArgs& args) {
  return args.state != nullptr && args.T == 1 && args.cu_seqlens.empty();
}

// What the recurrence reads: the projection, through the convolution if there is one.
View conv_forward(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  const ConvLayer conv = conv_of(args.config, args.layer);
  if (conv.width == 0) return a.proj;
  short_conv(ctx, {.first = conv.first,
                   .in = by_token(a.proj, args.B, args.T),
                   .weight = args.weights.conv,
                   .bias = args.weights.conv_bias,
                   .out = by_token(a.conv, args.B, args.T),
                   .cu_seqlens = args.cu_seqlens,
                   .state = args.state != nullptr ? args.state->conv : ShortConvState{}});
  return a.conv;
}

void mamba_forward(Context& ctx, const BlockForwardArgs& args, const MixerShape& shape,
                   const View& y) {
  const View proj = conv_forward(ctx, args);
  const MixerParams& params = args.weights.mixer;
  if (is_step(args)) {
    mixer_step(
        ctx, {.shape = shape, .params = params, .proj = proj, .y = y, .state = args.state->mixer});
  } else {
    mixer_scan(ctx, {.shape = shape,
                     .params = params,
                     .proj = by_token(proj, args.B, args.T),
                     .y = by_token(y, args.B, args.T),
                     .cu_seqlens = args.cu_seqlens,
                     .state = args.state != nullptr ? args.state->mixer : MixerState{}});
  }
}

void mamba2_forward(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  mamba_forward(ctx, args, args.config.mamba2, a.gated);
  grouped_rms_norm(ctx, {.groups = args.config.mamba2.G,
                         .x = a.gated,
                         .weight = args.weights.gated_norm,
                         .out = a.y,
                         .eps = args.config.mamba2.eps});
}

void delta_forward(Context& ctx, const BlockForwardArgs& args) {
  const View proj = conv_forward(ctx, args);
  const View& y = args.activations.y;
  const DeltaShape& shape = args.config.delta;
  const DeltaParams& params = args.weights.delta;
  if (is_step(args)) {
    delta_step(
        ctx, {.shape = shape, .params = params, .proj = proj, .y = y, .state = args.state->delta});
  } else {
    delta_scan(ctx, {.shape = shape,
                     .params = params,
                     .proj = by_token(proj, args.B, args.T),
                     .y = by_token(y, args.B, args.T),
                     .cu_seqlens = args.cu_seqlens,
                     .state = args.state != nullptr ? args.state->delta : DeltaState{}});
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

// Turns the queries and keys of a projection, or of its gradient back, in place.
void turn(Context& ctx, const AttentionConfig& c, const View& qkv, const View& cu_seqlens,
          const View& start, bool inverse) {
  if (c.rotary_dims == 0) return;
  rotary(ctx, {.x = qkv.slice(2, 0, (c.Hq + c.Hkv) * c.d),
               .d = c.d,
               .dims = c.rotary_dims,
               .base = c.rotary_base,
               .cu_seqlens = cu_seqlens,
               .start = start,
               .inverse = inverse});
}

void attention_forward(Context& ctx, const BlockForwardArgs& args) {
  const BlockActivations& a = args.activations;
  const AttentionConfig& c = args.config.attention;
  turn(ctx, c, by_token(a.proj, args.B, args.T), args.cu_seqlens,
       args.state != nullptr ? args.state->attention.lengths : View{}, /*inverse=*/false);
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
  if (is_step(args)) {
    attention_step(ctx, attention_args);
  } else {
    attention(ctx, attention_args);
  }
}

// proj -> y
void mixer_forward(Context& ctx, const BlockForwardArgs& args) {
  switch (args.config.kind(args.layer)) {
    case LayerKind::mamba3:
      return mamba_forward(ctx, args, args.config.mixer, args.activations.y);
    case LayerKind::mamba2:
      return mamba2_forward(ctx, args);
    case LayerKind::gated_deltanet:
      return delta_forward(ctx, args);
    case LayerKind::attention:
      return attention_forward(ctx, args);
  }
}

// What the backward of the recurrence reads and writes in the place of proj and d_proj.
struct RecurrenceInput {
  View proj, d_proj;  // (B, T, d_proj)
};
RecurrenceInput recurrence_input(const BlockBackwardArgs& args) {
  const BlockActivations& a = args.activations;
  const bool conv = !a.conv.empty();
  return {by_token(conv ? a.conv : a.proj, args.B, args.T),
          by_token(conv ? a.d_conv : a.d_proj, args.B, args.T)};
}

// d_conv -> d_proj
void conv_backward(Context& ctx, const BlockBackwardArgs& args) {
  const BlockActivations& a = args.activations;
  if (a.conv.empty()) return;
  short_conv_backward(ctx, {.first = conv_of(args.config, args.layer).first,
                            .in = by_token(a.proj, args.B, args.T),
                            .weight = args.weights.conv,
                            .bias = args.weights.conv_bias,
                            .d_out = by_token(a.d_conv, args.B, args.T),
                            .d_in = by_token(a.d_proj, args.B, args.T),
                            .d_weight = args.gradients.conv,
                            .d_bias = args.gradients.conv_bias,
                            .cu_seqlens = args.cu_seqlens});
}

void mamba_backward(Context& ctx, const BlockBackwardArgs& args, const MixerShape& shape) {
  const RecurrenceInput input = recurrence_input(args);
  mixer_scan_backward(ctx, {.shape = shape,
                            .params = args.weights.mixer,
                            .proj = input.proj,
                            .cu_seqlens = args.cu_seqlens,
                            .d_y = by_token(args.activations.d_y, args.B, args.T),
                            .d_proj = input.d_proj,
                            .d_params = args.gradients.mixer});
  conv_backward(ctx, args);
}

void mamba2_backward(Context& ctx, const BlockBackwardArgs& args) {
  const BlockActivations& a = args.activations;
  grouped_rms_norm_backward(ctx, {.groups = args.config.mamba2.G,
                                  .x = a.gated,
                                  .weight = args.weights.gated_norm,
                                  .eps = args.config.mamba2.eps,
                                  .d_out = a.d_y,
                                  .d_x = a.d_y,
                                  .d_weight = args.gradients.gated_norm});
  mamba_backward(ctx, args, args.config.mamba2);
}

void delta_backward(Context& ctx, const BlockBackwardArgs& args) {
  const RecurrenceInput input = recurrence_input(args);
  delta_scan_backward(ctx, {.shape = args.config.delta,
                            .params = args.weights.delta,
                            .proj = input.proj,
                            .cu_seqlens = args.cu_seqlens,
                            .d_y = by_token(args.activations.d_y, args.B, args.T),
                            .d_proj = input.d_proj,
                            .d_params = args.gradients.delta});
  conv_backward(ctx, args);
}

void attention_layer_backward(Context& ctx, const BlockBackwardArgs& args) {
  const BlockActivations& a = args.activations;
  const AttentionConfig& c = args.config.attention;
  const View d_qkv = by_token(a.d_proj, args.B, args.T);
  attention_backward(ctx, {.Hq = c.Hq,
                           .Hkv = c.Hkv,
                           .d = c.d,
                           .qkv = by_token(a.proj, args.B, args.T),
                           .y = by_token(a.y, args.B, args.T),
                           .lse = a.lse.reshape({args.B, c.Hq, args.T}),
                           .cu_seqlens = args.cu_seqlens,
                           .d_y = by_token(a.d_y, args.B, args.T),
                           .d_qkv = d_qkv});
  turn(ctx, c, d_qkv, args.cu_seqlens, {}, /*inverse=*/true);
}

// d_y -> d_proj
void mixer_backward(Context& ctx, const BlockBackwardArgs& args) {
  switch (args.config.kind(args.layer)) {
    case LayerKind::mamba3:
      return mamba_backward(ctx, args, args.config.mixer);
    case LayerKind::mamba2:
      return mamba2_backward(ctx, args);
    case LayerKind::gated_deltanet:
      return delta_backward(ctx, args);
    case LayerKind::attention:
      return attention_layer_backward(ctx, args);
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

// Those that the shape has; view(name) finds a tensor of the layer.
template <typename Find>
MixerParams resolve_mixer(const MixerShape& shape, const Find& view) {
  MixerParams p;
  p.dt_bias = view("mixer.dt_bias");
  if (!shape.has_dd_A()) p.A_log = view("mixer.A_log");
  if (shape.bc_bias) {
    p.B_bias = view("mixer.B_bias");
    p.C_bias = view("mixer.C_bias");
  }
  if (shape.bc_norm) {
    p.B_norm = view("mixer.B_norm.weight");
    p.C_norm = view("mixer.C_norm.weight");
  }
  p.D = view("mixer.D");
  if (shape.mimo) {
    p.mimo_x = view("mixer.mimo_x");
    p.mimo_z = view("mixer.mimo_z");
    p.mimo_o = view("mixer.mimo_o");
  }
  if (shape.out_norm) p.norm = view("mixer.norm.weight").reshape({shape.H, shape.P});
  return p;
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
  if (const ConvLayer conv = conv_of(config, layer); conv.width > 0) {
    w.conv = view("mixer.conv1d.weight").reshape({conv.channels, conv.width});
    if (conv.bias) w.conv_bias = view("mixer.conv1d.bias");
  }
  switch (config.kind(layer)) {
    case LayerKind::mamba3:
      w.mixer = resolve_mixer(config.mixer, view);
      break;
    case LayerKind::mamba2:
      w.mixer = resolve_mixer(config.mamba2, view);
      w.gated_norm = view("mixer.norm.weight");
      break;
    case LayerKind::gated_deltanet:
      w.delta = {.A_log = view("mixer.A_log"),
                 .dt_bias = view("mixer.dt_bias"),
                 .norm = view("mixer.norm.weight")};
      break;
    case LayerKind::attention:
      if (config.attention.qkv_bias) w.in_proj_bias = view("mixer.in_proj.bias");
      if (config.attention.out_bias) w.out_proj_bias = view("mixer.out_proj.bias");
      break;
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
  linear_swiglu(
      ctx,
      {.x = a.normed2, .weight = w.fc1, .y_gate = a.fc1, .out = a.act, .keeps = !a.rstd2.empty()});
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
