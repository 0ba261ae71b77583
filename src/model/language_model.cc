#include "model/language_model.h"

#include <algorithm>
#include <memory>

#include "core/error.h"
#include "core/memory.h"
#include "model/copy_converted.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"

namespace mamba3 {

namespace {

NamedTensors with_small_tensors_in_f32(const Config& config, const NamedTensors& tensors) {
  NamedTensors out;
  const auto owner = std::make_shared<const NamedTensors>(tensors);
  for (const TensorSpec& spec : parameter_table(config)) {
    const View& view = tensors.at(spec.name);
    if (is_matrix(spec.name) || view.dtype == DType::f32) {
      out.add(spec.name, view, owner);
      continue;
    }
    const auto values = std::make_shared<std::vector<float>>(static_cast<size_t>(view.size()));
    to_float(view.data, view.dtype, values->data(), view.size());
    const std::span<const int64_t> dims(view.dims.data(), static_cast<size_t>(view.rank));
    out.add(spec.name, make_view(values->data(), DType::f32, dims), values);
  }
  return out;
}

// The widest of all layers, and of those with a convolution or a norm after the gate.
struct SharedWidths {
  int64_t proj = 0, y = 0, conv = 0, gated = 0;
};

SharedWidths shared_widths(const Config& config) {
  SharedWidths most;
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const LayerWidths widths = widths_of(config, layer);
    most.proj = std::max(most.proj, widths.proj);
    most.y = std::max(most.y, widths.y);
    if (conv_of(config, layer).width > 0) most.conv = std::max(most.conv, widths.proj);
    if (config.kind(layer) == LayerKind::mamba2) most.gated = std::max(most.gated, widths.y);
  }
  return most;
}

// Elements from one row of a projection to the next. Products that write or read it want rows that
// begin on whole cache lines: on a GPU they gain up to a quarter by it.
int64_t proj_stride(int64_t columns) {
  constexpr int64_t kLine = 64;
  return (columns + kLine - 1) / kLine * kLine;
}

struct Batch {
  int64_t B = 1, T = 0;
};

Batch check_ids(const View& ids, const ModelActivations& activations) {
  if (ids.rank != 2 || ids.size() == 0) {
    input_error("[model] ids: got shape {}, want (B, T) with at least one token", ids.shape());
  }
  if (ids.size() != activations.hidden.dim(0)) {
    input_error("[model] the activations are for {} tokens, but ids has {}",
                activations.hidden.dim(0), ids.size());
  }
  return {ids.dim(0), ids.dim(1)};
}

// residual + delta, through the op that does that sum wherever the model runs.
void copy_stream(Context& ctx, const LanguageModel& model, const Stream& stream, const View& normed,
                 const View& out) {
  rms_norm(ctx, {.residual = stream.residual,
                 .delta = stream.delta,
                 .weight = model.weights.norm_f,
                 .residual_out = out,
                 .out = normed,
                 .eps = model.config.eps});
}

}  // namespace

bool is_matrix(std::string_view name) {
  constexpr std::string_view kMatrices[] = {"embedding.weight", "lm_head.weight", "proj.weight",
                                            "fc1.weight", "fc2.weight"};
  return std::any_of(std::begin(kMatrices), std::end(kMatrices),
                     [&](std::string_view suffix) { return name.ends_with(suffix); });
}

ModelWeights resolve_weights(const Config& config, const NamedTensors& tensors) {
  ModelWeights weights;
  weights.embedding = tensors.at("backbone.embedding.weight");
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    weights.blocks.push_back(resolve_block_weights(config, tensors, layer));
  }
  weights.norm_f = tensors.at("backbone.norm_f.weight");
  weights.head = config.tied ? weights.embedding : tensors.at("lm_head.weight");
  return weights;
}

LanguageModel make_language_model(const Config& config, const NamedTensors& tensors) {
  LanguageModel model{config, with_small_tensors_in_f32(config, tensors), {}};
  model.weights = resolve_weights(config, model.tensors);
  return model;
}

Placement placement_of(const LanguageModel& model) {
  const View& embedding = model.weights.embedding;
  if (embedding.device == Device::cpu) return {};
  return {embedding.device, embedding.dtype};
}

LanguageModel place_language_model(Context& ctx, const LanguageModel& model, DType dtype) {
  if (ctx.device == Device::cpu) return model;
  std::vector<TensorSpec> table = parameter_table(model.config);
  for (TensorSpec& spec : table) spec.dtype = is_matrix(spec.name) ? dtype : DType::f32;
  const NamedTensors tensors = allocate(table, ctx.device);
  for (const TensorSpec& spec : table) {
    copy_converted(ctx, model.tensors.at(spec.name), tensors.at(spec.name));
  }
  LanguageModel placed{model.config, tensors, {}};
  placed.weights = resolve_weights(placed.config, placed.tensors);
  return placed;
}

std::vector<TensorSpec> activation_table(const Config& config, int64_t tokens, Keep keep,
                                         DType dtype) {
  std::vector<TensorSpec> table;
  const auto add = [&](Lifetime lifetime, std::string name, int64_t columns) {
    if (columns == 0) return;
    constexpr std::string_view kExact[] = {"residual", "residual2", "rstd",
                                           "rstd2",    "lse",       "d_stream"};
    const std::string_view what = std::string_view(name).substr(name.rfind('.') + 1);
    const bool exact = std::find(std::begin(kExact), std::end(kExact), what) != std::end(kExact);
    table.push_back({.name = std::move(name),
                     .dims = {tokens, columns},
                     .dtype = exact ? DType::f32 : dtype,
                     .lifetime = lifetime});
  };
  const SharedWidths largest = shared_widths(config);
  const bool training = keep != Keep::nothing;
  // What a block's forward leaves for its backward besides the stream that it read.
  const auto block = [&](Lifetime lifetime, const std::string& prefix, const SharedWidths& widths,
                         bool attention) {
    add(lifetime, prefix + "rstd", 1);
    add(lifetime, prefix + "normed", config.D);
    add(lifetime, prefix + "proj", proj_stride(widths.proj));
    add(lifetime, prefix + "conv", proj_stride(widths.conv));
    add(lifetime, prefix + "gated", widths.gated);
    add(lifetime, prefix + "y", widths.y);
    add(lifetime, prefix + "lse", attention ? config.attention.Hq : 0);
    if (config.d_mlp == 0) return;
    add(lifetime, prefix + "residual2", config.D);
    add(lifetime, prefix + "rstd2", 1);
    add(lifetime, prefix + "normed2", config.D);
    add(lifetime, prefix + "fc1", 2 * config.d_mlp);
    add(lifetime, prefix + "act", config.d_mlp);
  };
  for (int64_t layer = 0; training && layer < config.n_layer; ++layer) {
    const std::string prefix = fmt::format("layers.{}.", layer);
    add(Lifetime::activation, prefix + "residual", config.D);
    if (keep == Keep::streams) continue;
    const LayerWidths widths = widths_of(config, layer);
    const LayerKind kind = config.kind(layer);
    block(Lifetime::activation, prefix,
          {.proj = widths.proj,
           .y = widths.y,
           .conv = conv_of(config, layer).width > 0 ? widths.proj : 0,
           .gated = kind == LayerKind::mamba2 ? widths.y : 0},
          kind == LayerKind::attention);
  }
  if (keep == Keep::streams) {
    block(Lifetime::scratch, "block.", largest, config.has(LayerKind::attention));
  }
  const Lifetime stream = training ? Lifetime::activation : Lifetime::scratch;
  add(stream, "residual", config.D);
  add(stream, "hidden", config.D);
  add(Lifetime::scratch, "delta", config.D);
  if (training) {
    add(Lifetime::activation, "rstd", 1);
    for (const char* name : {"d_hidden", "d_stream", "d_normed"})
      add(Lifetime::scratch, name, config.D);
    if (dtype != DType::f32) add(Lifetime::scratch, "d_stream_copy", config.D);
    add(Lifetime::scratch, "d_act", config.d_mlp);
  } else {
    add(Lifetime::scratch, "normed", config.D);
    add(Lifetime::scratch, "fc1", 2 * config.d_mlp);
    add(Lifetime::scratch, "act", config.d_mlp);
  }
  add(Lifetime::scratch, training ? "d_proj" : "proj", proj_stride(largest.proj));
  add(Lifetime::scratch, training ? "d_y" : "y", largest.y);
  add(Lifetime::scratch, training ? "d_conv" : "conv", proj_stride(largest.conv));
  if (!training) add(Lifetime::scratch, "gated", largest.gated);
  return table;
}

ModelActivations resolve_activations(const Config& config, const NamedTensors& tensors,
                                     int64_t tokens) {
  const bool training = tensors.contains("d_stream");
  // Shared tensors are as wide as the widest layer; each layer sees them at its own width, densely
  // but for the projection.
  const auto shared = [&](std::string_view name, int64_t columns) {
    const View view = tensors.find(name);
    if (view.empty()) return View{};
    if (tokens > view.dim(0))
      input_error("[model] activations for {} tokens: there is room for {}", tokens, view.dim(0));
    return make_view(view.data, view.dtype, {tokens, columns}, view.device);
  };
  const auto proj = [&](std::string_view name, int64_t columns) {
    const View view = shared(name, proj_stride(columns));
    return view.empty() ? view : view.slice(1, 0, columns);
  };
  const auto column = [&](std::string_view name) {
    const View view = shared(name, 1);
    return view.empty() ? view : view.reshape({tokens});
  };
  ModelActivations out;
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    // The layer's own, or what the layers share.
    const auto own = [&](std::string_view name) {
      if (!training) return std::string(name);
      const std::string kept = fmt::format("layers.{}.{}", layer, name);
      return tensors.contains(kept) ? kept : fmt::format("block.{}", name);
    };
    const LayerWidths widths = widths_of(config, layer);
    const bool conv = conv_of(config, layer).width > 0;
    BlockActivations a;
    a.residual = shared(own("residual"), config.D);
    a.proj = proj(own("proj"), widths.proj);
    if (conv) a.conv = proj(own("conv"), widths.proj);
    if (config.kind(layer) == LayerKind::mamba2) a.gated = shared(own("gated"), widths.y);
    a.y = shared(own("y"), widths.y);
    a.residual2 = shared(training ? own("residual2") : "residual", config.D);
    a.normed = shared(own("normed"), config.D);
    a.normed2 = shared(training ? own("normed2") : "normed", config.D);
    a.fc1 = shared(own("fc1"), 2 * config.d_mlp);
    a.act = shared(own("act"), config.d_mlp);
    a.delta = shared("delta", config.D);
    if (training) {
      a.rstd = column(own("rstd"));
      a.rstd2 = column(own("rstd2"));
      a.lse = shared(own("lse"), config.attention.Hq);
      a.d_normed = shared("d_normed", config.D);
      a.d_proj = proj("d_proj", widths.proj);
      if (conv) a.d_conv = proj("d_conv", widths.proj);
      a.d_y = shared("d_y", widths.y);
      a.d_act = shared("d_act", config.d_mlp);
    }
    out.blocks.push_back(a);
  }
  out.residual = shared("residual", config.D);
  out.hidden = shared("hidden", config.D);
  out.rstd = column("rstd");
  out.d_hidden = shared("d_hidden", config.D);
  out.d_stream = shared("d_stream", config.D);
  out.d_stream_copy = shared("d_stream_copy", config.D);
  return out;
}

Stream model_stream(Context& ctx, const LanguageModel& model, const ModelForwardArgs& args) {
  const Config& config = model.config;
  const ModelActivations& a = args.activations;
  const Batch batch = check_ids(args.ids, a);
  Stream stream{.residual = a.blocks.front().residual};
  embedding(ctx, {.ids = args.ids.reshape({batch.B * batch.T}),
                  .weight = model.weights.embedding,
                  .out = stream.residual});
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const size_t i = static_cast<size_t>(layer);
    stream = block_forward(ctx,
                           {.config = config,
                            .weights = model.weights.blocks[i],
                            .activations = a.blocks[i],
                            .layer = layer,
                            .B = batch.B,
                            .T = batch.T,
                            .cu_seqlens = args.cu_seqlens,
                            .host_cu_seqlens = args.host_cu_seqlens,
                            .state = args.state != nullptr ? &args.state->blocks[i] : nullptr},
                           stream);
    // The norm of the copy goes where nothing is yet.
    if (i < args.residuals.size() && !args.residuals[i].empty())
      copy_stream(ctx, model, stream, a.hidden, args.residuals[i]);
  }
  return stream;
}

void model_hidden(Context& ctx, const LanguageModel& model, const Stream& rows,
                  const View& hidden) {
  copy_stream(ctx, model, rows, hidden, rows.residual);
}

void model_forward(Context& ctx, const LanguageModel& model, const ModelForwardArgs& args) {
  const ModelActivations& a = args.activations;
  const Stream stream = model_stream(ctx, model, args);
  rms_norm(ctx, {.residual = stream.residual,
                 .delta = stream.delta,
                 .weight = model.weights.norm_f,
                 .residual_out = a.residual,
                 .out = a.hidden,
                 .rstd = a.rstd,
                 .eps = model.config.eps});
}

void model_logits(Context& ctx, const LanguageModel& model, const View& hidden,
                  const View& logits) {
  linear(ctx, {.x = hidden, .weight = model.weights.head, .y = logits});
}

void model_loss(Context& ctx, const LanguageModel& model, const ModelLossArgs& args) {
  const bool backward = args.gradients != nullptr;
  cross_entropy(ctx, {.hidden = args.activations.hidden,
                      .weight = model.weights.head,
                      .targets = args.targets,
                      .vocab = model.config.vocab,
                      .nll = args.nll,
                      .d_hidden = backward ? args.activations.d_hidden : View{},
                      .d_weight = backward ? args.gradients->head : View{},
                      .scale = args.scale});
}

void model_backward(Context& ctx, const LanguageModel& model, const ModelBackwardArgs& args) {
  const Config& config = model.config;
  const ModelActivations& a = args.activations;
  const Batch batch = check_ids(args.ids, a);
  if (a.d_stream.empty())
    input_error("[model] the backward needs activations made with Keep::for_backward");
  // Nothing comes along the stream from beyond the last norm.
  zero(ctx, a.d_stream);
  rms_norm_backward(ctx, {.residual = a.residual,
                          .weight = model.weights.norm_f,
                          .rstd = a.rstd,
                          .d_out = a.d_hidden,
                          .d_residual = a.d_stream,
                          .d_residual_copy = a.d_stream_copy,
                          .d_weight = args.gradients.norm_f});
  for (int64_t layer = config.n_layer - 1; layer >= 0; --layer) {
    const size_t i = static_cast<size_t>(layer);
    // What the layers share is now the last one's; every other forward is done again.
    const bool shared =
        layer + 1 < config.n_layer && a.blocks[i].proj.data == a.blocks[i + 1].proj.data;
    if (shared) {
      block_forward(ctx,
                    {.config = config,
                     .weights = model.weights.blocks[i],
                     .activations = a.blocks[i],
                     .layer = layer,
                     .B = batch.B,
                     .T = batch.T,
                     .cu_seqlens = args.cu_seqlens},
                    {.residual = a.blocks[i].residual});
    }
    block_backward(ctx,
                   {.config = config,
                    .weights = model.weights.blocks[i],
                    .activations = a.blocks[i],
                    .gradients = args.gradients.blocks[i],
                    .layer = layer,
                    .B = batch.B,
                    .T = batch.T,
                    .cu_seqlens = args.cu_seqlens},
                   {.total = a.d_stream, .copy = a.d_stream_copy});
  }
  embedding_backward(ctx, {.ids = args.ids.reshape({batch.B * batch.T}),
                           .d_out = a.d_stream,
                           .d_weight = args.gradients.embedding});
}

}  // namespace mamba3
