#include "train/evaluate.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace mamba3 {

namespace {

// The op reads it only, but a View does not know const.
View view_of(const std::vector<int32_t>& values, std::initializer_list<int64_t> dims) {
  return make_view(const_cast<int32_t*>(values.data()), DType::i32, dims);
}

int64_t correct_answers(Context& ctx, const LanguageModel& model, const View& hidden,
                        const Batch& batch, int64_t scored) {
  const int64_t D = hidden.dim(1), V = model.weights.head.dim(0);
  std::vector<float> rows(static_cast<size_t>(scored * D)), logits(static_cast<size_t>(scored * V));
  std::vector<int32_t> answers;
  for (size_t i = 0; i < batch.targets.size(); ++i) {
    if (batch.targets[i] < 0) continue;
    std::memcpy(rows.data() + std::ssize(answers) * D,
                hidden.as<float>() + static_cast<int64_t>(i) * D,
                static_cast<size_t>(D) * sizeof(float));
    answers.push_back(batch.targets[i]);
  }
  model_logits(ctx, model, make_view(rows.data(), DType::f32, {scored, D}),
               make_view(logits.data(), DType::f32, {scored, V}));
  int64_t correct = 0;
  for (int64_t i = 0; i < scored; ++i) {
    const float* row = logits.data() + i * V;
    correct +=
        std::max_element(row, row + model.config.vocab) - row == answers[static_cast<size_t>(i)];
  }
  return correct;
}

}  // namespace

Evaluation& Evaluation::operator+=(const Evaluation& other) {
  nll += other.nll;
  scored += other.scored;
  correct += other.correct;
  return *this;
}

View ids_view(const Batch& batch) {
  return view_of(batch.tokens, {batch.B, batch.T});
}

View targets_view(const Batch& batch) {
  return view_of(batch.targets, {batch.B * batch.T});
}

Evaluation evaluate(Context& ctx, const LanguageModel& model, const NamedTensors& activations,
                    const Batch& batch, bool count_correct) {
  const int64_t tokens = batch.B * batch.T;
  const ModelActivations a = resolve_activations(model.config, activations, tokens);
  std::vector<float> nll(static_cast<size_t>(tokens));
  model_forward(ctx, model, {.ids = ids_view(batch), .cu_seqlens = {}, .activations = a});
  model_loss(ctx, model,
             {.activations = a,
              .targets = targets_view(batch),
              .nll = make_view(nll.data(), DType::f32, {tokens})});
  Evaluation result{.scored = batch.scored()};
  for (const float value : nll) result.nll += static_cast<double>(value);
  if (count_correct) result.correct = correct_answers(ctx, model, a.hidden, batch, result.scored);
  return result;
}

Evaluation evaluate_validation(Context& ctx, const LanguageModel& model,
                               const NamedTensors& activations, int64_t tokens,
                               const BatchSource& source, bool count_correct) {
  const int64_t rows = source.validation_rows();
  const int64_t rows_at_once = tokens / std::max<int64_t>(1, source.validation_length());
  if (rows_at_once < 1) {
    input_error("a validation sequence has {} tokens, but there is room for {}",
                source.validation_length(), tokens);
  }
  Evaluation result;
  Batch batch;
  for (int64_t first = 0; first < rows; first += rows_at_once) {
    source.validate(first, std::min(rows_at_once, rows - first), batch);
    result += evaluate(ctx, model, activations, batch, count_correct);
  }
  return result;
}

}  // namespace mamba3
