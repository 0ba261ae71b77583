#include "train/evaluate.h"

#include <algorithm>

#include "core/error.h"
#include "core/memory.h"

namespace mamba3 {

namespace {

View take(ScratchScope& scope, DType dtype, std::initializer_list<int64_t> dims, Device device) {
  View view = make_view(nullptr, dtype, dims, device);
  view.data = scope.take<std::byte>(view.bytes()).data();
  return view;
}

int64_t correct_answers(Context& ctx, const LanguageModel& model, const View& hidden,
                        const Batch& batch, int64_t scored) {
  const int64_t D = hidden.dim(1), V = model.weights.head.dim(0);
  ScratchScope scope(ctx.scratch);
  const View rows = take(scope, hidden.dtype, {scored, D}, ctx.device);
  const View logits = take(scope, DType::f32, {scored, V}, ctx.device);
  std::vector<int32_t> answers;
  for (size_t i = 0; i < batch.targets.size(); ++i) {
    if (batch.targets[i] < 0) continue;
    copy(ctx, hidden.select(0, static_cast<int64_t>(i)), rows.select(0, std::ssize(answers)));
    answers.push_back(batch.targets[i]);
  }
  model_logits(ctx, model, rows, logits);
  std::vector<float> values(static_cast<size_t>(scored * V));
  copy(ctx, logits, view_of(values.data(), {scored, V}));
  int64_t correct = 0;
  for (int64_t i = 0; i < scored; ++i) {
    const float* row = values.data() + i * V;
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

PlacedBatch::PlacedBatch(Context& ctx, const Batch& batch) : ctx_(ctx), scope_(ctx.scratch) {
  const int64_t tokens = batch.B * batch.T;
  ids_ = take(scope_, DType::i32, {batch.B, batch.T}, ctx.device);
  targets_ = take(scope_, DType::i32, {tokens}, ctx.device);
  nll_ = take(scope_, DType::f32, {tokens}, ctx.device);
  copy(ctx, view_of(batch.tokens.data(), {tokens}), ids_);
  copy(ctx, view_of(batch.targets.data(), {tokens}), targets_);
}

double PlacedBatch::sum_of_nll() const {
  std::vector<float> values(static_cast<size_t>(nll_.size()));
  copy(ctx_, nll_, view_of(values.data(), {nll_.size()}));
  double sum = 0;
  for (const float value : values) sum += static_cast<double>(value);
  return sum;
}

Evaluation evaluate(Context& ctx, const LanguageModel& model, const NamedTensors& activations,
                    const Batch& batch, bool count_correct) {
  const ModelActivations a = resolve_activations(model.config, activations, batch.B * batch.T);
  const PlacedBatch placed(ctx, batch);
  model_forward(ctx, model, {.ids = placed.ids(), .cu_seqlens = {}, .activations = a});
  model_loss(ctx, model, {.activations = a, .targets = placed.targets(), .nll = placed.nll()});
  Evaluation result{.nll = placed.sum_of_nll(), .scored = batch.scored()};
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

Evaluation evaluate_length(Context& ctx, const LanguageModel& model, const Task& task,
                           int64_t length, int64_t count,
                           const std::function<void(int64_t)>& on_rows) {
  // Tokens that run at once: enough to keep the machine busy, few enough to stay in its caches.
  constexpr int64_t kTokensAtOnce = 8192;
  const TaskSource source(task, {.length = {.first = length, .last = length},
                                 .validation_length = length,
                                 .validation_rows = count});
  const int64_t rows = std::max<int64_t>(1, kTokensAtOnce / length);
  const NamedTensors activations = allocate(
      activation_table(model.config, rows * length, Keep::nothing, placement_of(model).dtype),
      ctx.device);
  Evaluation total;
  Batch batch;
  for (int64_t first = 0; first < count; first += rows) {
    const int64_t n = std::min(rows, count - first);
    source.validate(first, n, batch);
    total += evaluate(ctx, model, activations, batch, /*count_correct=*/true);
    on_rows(n);
  }
  return total;
}

}  // namespace mamba3
