#include "train/trainer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace mamba3 {

namespace {

std::vector<AdamwTensor> adamw_tensors(const Config& config, const Trainer::State& state,
                                       const NamedTensors& gradients) {
  std::vector<AdamwTensor> tensors;
  for (const TensorSpec& spec : parameter_table(config)) {
    tensors.push_back({.param = state.parameters.at(spec.name),
                       .grad = gradients.at(spec.name),
                       .m = state.m.at(spec.name),
                       .v = state.v.at(spec.name),
                       .decay = spec.decay});
  }
  return tensors;
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

Trainer::Trainer(Context& ctx, const Config& config, State state, int64_t tokens)
    : ctx_(ctx),
      state_(std::move(state)),
      model_(make_language_model(config, state_.parameters)),
      gradients_(allocate(parameter_table(config))),
      activations_(allocate(activation_table(config, tokens, Keep::for_backward))),
      gradient_weights_(resolve_weights(config, gradients_)),
      tensors_(adamw_tensors(config, state_, gradients_)),
      tokens_(tokens),
      nll_(static_cast<size_t>(tokens)) {}

void Trainer::clear_gradients() {
  for (const AdamwTensor& tensor : tensors_) {
    std::fill_n(tensor.grad.as<float>(), tensor.grad.size(), 0.0f);
  }
}

// Adds the gradient of scale * sum(nll); returns sum(nll).
double Trainer::accumulate(const Batch& batch, float scale) {
  const int64_t tokens = batch.B * batch.T;
  const ModelActivations a = resolve_activations(model_.config, activations_, tokens);
  const View ids = ids_view(batch);
  model_forward(ctx_, model_, {.ids = ids, .cu_seqlens = {}, .activations = a});
  model_loss(ctx_, model_,
             {.activations = a,
              .targets = targets_view(batch),
              .nll = make_view(nll_.data(), DType::f32, {tokens}),
              .gradients = &gradient_weights_,
              .scale = scale});
  model_backward(ctx_, model_,
                 {.ids = ids, .cu_seqlens = {}, .activations = a, .gradients = gradient_weights_});
  double sum = 0;
  for (int64_t i = 0; i < tokens; ++i) sum += static_cast<double>(nll_[static_cast<size_t>(i)]);
  return sum;
}

Update Trainer::update(std::span<const Batch> micro_batches, const OptimizerSettings& optimizer,
                       double lr) {
  int64_t scored = 0;
  for (const Batch& batch : micro_batches) scored += batch.scored();
  if (scored == 0) input_error("a training batch has no scored token");
  clear_gradients();
  Update result;
  for (const Batch& batch : micro_batches) {
    result.loss += accumulate(batch, 1.0f / static_cast<float>(scored));
  }
  result.loss /= static_cast<double>(scored);
  result.grad_norm = std::numeric_limits<double>::quiet_NaN();
  if (!std::isfinite(result.loss)) return result;
  float norm = 0;
  adamw(ctx_, {.tensors = tensors_,
               .lr = static_cast<float>(lr),
               .beta1 = static_cast<float>(optimizer.beta1),
               .beta2 = static_cast<float>(optimizer.beta2),
               .eps = static_cast<float>(optimizer.eps),
               .weight_decay = static_cast<float>(optimizer.weight_decay),
               .clip = static_cast<float>(optimizer.clip),
               .step = state_.updates + 1,
               .grad_norm = make_view(&norm, DType::f32, {1})});
  result.grad_norm = static_cast<double>(norm);
  result.applied = std::isfinite(norm);
  state_.updates += result.applied;
  return result;
}

Evaluation Trainer::validate(const BatchSource& source, bool count_correct) {
  return evaluate_validation(ctx_, model_, activations_, tokens_, source, count_correct);
}

}  // namespace mamba3
