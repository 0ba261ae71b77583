#pragma once

#include <cstdint>
#include <functional>

#include "model/language_model.h"
#include "train/batch.h"

namespace mamba3 {

struct Evaluation {
  double nll = 0;       // nats, summed over the scored tokens
  int64_t scored = 0;   // targets that are not -1
  int64_t correct = 0;  // of them, those whose logit is the largest; 0 unless counted

  double loss() const { return nll / static_cast<double>(scored); }
  double accuracy() const { return static_cast<double>(correct) / static_cast<double>(scored); }
  Evaluation& operator+=(const Evaluation& other);
};

// A batch where the context is, for the model's calls, with room for its losses. Lives on the
// context's scratch.
class PlacedBatch {
 public:
  PlacedBatch(Context& ctx, const Batch& batch);

  const View& ids() const { return ids_; }          // (B, T) i32
  const View& targets() const { return targets_; }  // (B T) i32
  const View& nll() const { return nll_; }          // (B T) f32
  double sum_of_nll() const;                        // waits for the device

 private:
  Context& ctx_;
  ScratchScope scope_;
  View ids_, targets_, nll_;
};

// The loss of a batch and, with `count_correct` (meant for the small vocabularies of tasks), how
// often the model's first choice is right. `activations` is an allocated activation_table() with
// room for B T tokens.
Evaluation evaluate(Context& ctx, const LanguageModel& model, const NamedTensors& activations,
                    const Batch& batch, bool count_correct);

// The whole validation set of a source, as many rows at a time as `tokens`, the room in
// `activations`, holds. Throws InputError when not even one row fits.
Evaluation evaluate_validation(Context& ctx, const LanguageModel& model,
                               const NamedTensors& activations, int64_t tokens,
                               const BatchSource& source, bool count_correct);

// The final answers of `count` sequences of a task, all of one length, which do not depend on any
// run. Calls on_rows(n) after every n of them.
Evaluation evaluate_length(
    Context& ctx, const LanguageModel& model, const Task& task, int64_t length, int64_t count,
    const std::function<void(int64_t)>& on_rows = [](int64_t) {});

}  // namespace mamba3
