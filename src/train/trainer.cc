#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>

#include "core/error.h"
#include "core/memory.h"
#include "model/copy_converted.h"
#include "ops/add_sum.h"

namespace mamba3 {

namespace {

// A bound of their memory, and more than a curriculum has lengths: a recording that is forgotten
// before its length comes again is never replayed.
constexpr size_t kMostRecordings = 256;

std::vector<AdamwTensor> adamw_tensors(const Config& config, const Trainer::State& state,
                                       const NamedTensors& gradients, const NamedTensors& low) {
  std::vector<AdamwTensor> tensors;
  for (const TensorSpec& spec : parameter_table(config)) {
    tensors.push_back({.param = state.parameters.at(spec.name),
                       .grad = gradients.at(spec.name),
                       .m = state.m.at(spec.name),
                       .v = state.v.at(spec.name),
                       .decay = spec.decay,
                       .low = low.find(spec.name)});
  }
  return tensors;
}

// Copies of the matrices in the type.
NamedTensors low_matrices(Context& ctx, const Config& config, const NamedTensors& parameters,
                          DType dtype) {
  if (dtype == DType::f32) return {};
  std::vector<TensorSpec> table;
  for (TensorSpec& spec : parameter_table(config)) {
    if (!is_matrix(spec.name)) continue;
    spec.dtype = dtype;
    table.push_back(spec);
  }
  NamedTensors low = allocate(table, ctx.device);
  for (const TensorSpec& spec : table) {
    copy_converted(ctx, parameters.at(spec.name), low.at(spec.name));
  }
  return low;
}

// What the model computes with: the matrices of `low`, and the other parameters.
NamedTensors with_low(const Config& config, const NamedTensors& parameters,
                      const NamedTensors& low) {
  NamedTensors tensors;
  const auto owner = std::make_shared<const std::pair<NamedTensors, NamedTensors>>(parameters, low);
  for (const TensorSpec& spec : parameter_table(config)) {
    const View rounded = low.find(spec.name);
    tensors.add(spec.name, rounded.empty() ? parameters.at(spec.name) : rounded, owner);
  }
  return tensors;
}

// A state in host memory, where the context is: on the CPU itself.
Trainer::State placed(Context& ctx, const Trainer::State& state) {
  if (ctx.device == Device::cpu) return state;
  return {.parameters = copy_to_device(ctx, state.parameters),
          .m = copy_to_device(ctx, state.m),
          .v = copy_to_device(ctx, state.v),
          .updates = state.updates};
}

}  // namespace

void OptimizerSettings::check() const {
  const auto below_one = [](double beta) { return beta >= 0 && beta < 1; };
  if (!below_one(beta1) || !below_one(beta2)) {
    input_error("the betas of AdamW must be from 0 to below 1, got {} and {}", beta1, beta2);
  }
  if (!(eps > 0)) input_error("the eps of AdamW must be above 0, got {}", eps);
  if (!(weight_decay >= 0)) input_error("weight decay must not be negative, got {}", weight_decay);
  if (!(clip >= 0)) input_error("the clipping norm must not be negative, got {}", clip);
}

Trainer::State Trainer::fresh_state(const Config& config, const NamedTensors& parameters) {
  const std::vector<TensorSpec> table = parameter_table(config);
  State state{.parameters = allocate(table), .m = allocate(table), .v = allocate(table)};
  for (const TensorSpec& spec : table) {
    const View& from = parameters.at(spec.name);
    const View& to = state.parameters.at(spec.name);
    to_float(from.data, from.dtype, to.as<float>(), to.size());
  }
  return state;
}

Trainer::Trainer(Context& ctx, const Config& config, const State& state, int64_t tokens,
                 DType dtype, bool recompute)
    : ctx_(ctx),
      state_(placed(ctx, state)),
      low_(low_matrices(ctx, config, state.parameters, dtype)),
      model_(make_language_model(config, with_low(config, state_.parameters, low_))),
      gradients_(allocate(parameter_table(config), ctx.device)),
      activations_(allocate(
          activation_table(config, tokens, recompute ? Keep::streams : Keep::for_backward, dtype),
          ctx.device)),
      gradient_weights_(resolve_weights(config, gradients_)),
      tensors_(adamw_tensors(config, state_, gradients_, low_)),
      tokens_(tokens),
      feed_(ctx.device, tokens),
      outcome_(allocate_zeros(ctx.device, sizeof(Outcome))),
      fetch_(ctx.device, sizeof(Outcome)) {}

Trainer::State Trainer::state() const {
  if (ctx_.device == Device::cpu) return state_;
  return {.parameters = copy_to_host(ctx_, state_.parameters),
          .m = copy_to_host(ctx_, state_.m),
          .v = copy_to_host(ctx_, state_.v),
          .updates = state_.updates};
}

void Trainer::clear_gradients() {
  // They are one allocation in the order of the table: one call rather than a hundred.
  const View first = tensors_.front().grad, last = tensors_.back().grad;
  const int64_t size = last.as<float>() + last.size() - first.as<float>();
  zero(ctx_, make_view(first.data, DType::f32, {size}, first.device));
}

View Trainer::nll_sum() const {
  return make_view(static_cast<std::byte*>(outcome_.get()) + offsetof(Outcome, nll), DType::f64,
                   {1}, ctx_.device);
}

View Trainer::grad_norm() const {
  return make_view(static_cast<std::byte*>(outcome_.get()) + offsetof(Outcome, grad_norm),
                   DType::f32, {1}, ctx_.device);
}

Graph& Trainer::graph_of(const Piece& piece) {
  const auto known = std::ranges::find(recordings_, piece, &RecordedPiece::piece);
  if (known != recordings_.end()) {
    recordings_.splice(recordings_.begin(), recordings_, known);
  } else {
    recordings_.push_front({piece, {}});
    if (recordings_.size() > kMostRecordings) recordings_.pop_back();
  }
  return recordings_.front().graph;
}

// Of what is in feed_. Recorded, so whatever changes from update to update is read from there.
void Trainer::run(const Piece& piece, const AdamwArgs& optimizer) {
  if (piece.first) {
    clear_gradients();
    zero(ctx_, nll_sum());
  }
  const int64_t M = piece.B * piece.T;
  const View ids = feed_.ids(piece.B, piece.T);
  const ModelActivations a = resolve_activations(model_.config, activations_, M);
  {
    ScratchScope scope(ctx_.scratch);
    const View nll = make_view(scope.take<float>(M).data(), DType::f32, {M}, ctx_.device);
    model_forward(ctx_, model_, {.ids = ids, .cu_seqlens = {}, .activations = a});
    model_loss(ctx_, model_,
               {.activations = a,
                .targets = feed_.targets(piece.B, piece.T),
                .nll = nll,
                .gradients = &gradient_weights_,
                .scale = feed_.scale()});
    add_sum(ctx_, {.values = nll, .total = nll_sum()});
    model_backward(
        ctx_, model_,
        {.ids = ids, .cu_seqlens = {}, .activations = a, .gradients = gradient_weights_});
  }
  if (piece.last) adamw(ctx_, optimizer);
}

void Trainer::start(std::span<const Batch> micro_batches, const OptimizerSettings& optimizer,
                    double lr) {
  scored_ = 0;
  for (const Batch& batch : micro_batches) {
    scored_ += batch.scored();
    if (batch.B * batch.T > tokens_) {
      input_error("a batch of {} tokens: there is room for {}", batch.B * batch.T, tokens_);
    }
  }
  if (scored_ == 0) input_error("a training batch has no scored token");
  if (optimizer != optimizer_) recordings_.clear();
  optimizer_ = optimizer;
  const AdamwArgs update{.tensors = tensors_,
                         .lr = static_cast<float>(lr),
                         .beta1 = static_cast<float>(optimizer.beta1),
                         .beta2 = static_cast<float>(optimizer.beta2),
                         .eps = static_cast<float>(optimizer.eps),
                         .weight_decay = static_cast<float>(optimizer.weight_decay),
                         .clip = static_cast<float>(optimizer.clip),
                         .step = state_.updates + 1,
                         .numbers = feed_.numbers(),
                         .loss = nll_sum(),
                         .grad_norm = grad_norm()};
  const AdamwNumbers numbers = adamw_numbers(update);
  for (const Batch& batch : micro_batches) {
    const Piece piece{.B = batch.B,
                      .T = batch.T,
                      .first = &batch == &micro_batches.front(),
                      .last = &batch == &micro_batches.back()};
    feed_.fill(ctx_, batch, 1.0f / static_cast<float>(scored_), numbers);
    graph_of(piece).run(ctx_, [&] { run(piece, update); });
  }
  fetch_.start(ctx_, make_view(outcome_.get(), DType::u8, {sizeof(Outcome)}, ctx_.device));
}

Update Trainer::finish() {
  Outcome outcome;
  std::memcpy(&outcome, fetch_.wait(), sizeof outcome);
  Update result{.loss = outcome.nll / static_cast<double>(scored_),
                .grad_norm = std::numeric_limits<double>::quiet_NaN()};
  // As adamw() has decided on the device.
  if (!std::isfinite(result.loss)) return result;
  result.grad_norm = static_cast<double>(outcome.grad_norm);
  result.applied = std::isfinite(outcome.grad_norm);
  state_.updates += result.applied;
  return result;
}

Update Trainer::update(std::span<const Batch> micro_batches, const OptimizerSettings& optimizer,
                       double lr) {
  start(micro_batches, optimizer, lr);
  return finish();
}

Evaluation Trainer::validate(const BatchSource& source, bool count_correct) {
  return evaluate_validation(ctx_, model_, activations_, tokens_, source, count_correct);
}

}  // namespace mamba3
