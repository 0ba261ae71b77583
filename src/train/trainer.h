#pragma once

#include <cstdint>
#include <list>
#include <span>
#include <vector>

#include "core/fetch.h"
#include "core/graph.h"
#include "model/language_model.h"
#include "ops/adamw.h"
#include "train/batch.h"
#include "train/evaluate.h"
#include "train/feed.h"

namespace mamba3 {

struct OptimizerSettings {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;
  double clip = 1.0;  // of the global gradient norm; 0: no clipping

  void check() const;  // throws InputError for values outside their range
  bool operator==(const OptimizerSettings&) const = default;
};

// What an update did.
struct Update {
  double loss = 0;       // nats per scored token over the whole batch
  double grad_norm = 0;  // before clipping
  bool applied = false;  // false: loss or gradient was not finite and nothing changed
};

// A model with its gradients and optimiser. Everything is f32 and has the names of
// parameter_table(); the weights are updated in place.
class Trainer {
 public:
  // The tensors that a run carries from update to update, as they are saved and restored.
  struct State {
    NamedTensors parameters, m, v;
    int64_t updates = 0;  // applied so far: the step of AdamW
  };

  // A fresh state from parameters of any floating type, which are copied.
  static State fresh_state(const Config& config, const NamedTensors& parameters);

  // Takes a state in host memory to where the context is. `tokens`: the largest B T of a batch, in
  // training or evaluation. `dtype`: of the matrices and activations that the model computes with;
  // on the GPU f32 or bf16, whose master weights stay f32. `recompute`: keep little of the forward
  // and do it again in the backward (Keep::streams).
  Trainer(Context& ctx, const Config& config, const State& state, int64_t tokens,
          DType dtype = DType::f32, bool recompute = false);

  // One update from the micro batches of a step. The loss is the mean over all their scored
  // tokens, so two micro batches are the same (to rounding) as one of both sizes.
  Update update(std::span<const Batch> micro_batches, const OptimizerSettings& optimizer,
                double lr);
  // The same in two halves. When start() returns, the batches are not needed any more, and on the
  // GPU the host has time to make the next ones. Nothing else of the trainer is called in between.
  void start(std::span<const Batch> micro_batches, const OptimizerSettings& optimizer, double lr);
  Update finish();

  // The validation set of a source; there must be one.
  Evaluation validate(const BatchSource& source, bool count_correct);

  const LanguageModel& model() const { return model_; }
  State state() const;  // in host memory; on the CPU not a copy

 private:
  // What is recorded: the work for a micro batch of B sequences of T tokens. The first of an update
  // clears the gradients, the last updates the weights; so without accumulation it is all.
  struct Piece {
    int64_t B, T;
    bool first, last;
    bool operator==(const Piece&) const = default;
  };
  struct RecordedPiece {
    Piece piece;
    Graph graph;
  };
  // What the host is told of an update, by one fetch.
  struct Outcome {
    double nll;  // summed over the scored tokens
    float grad_norm;
  };

  Graph& graph_of(const Piece& piece);
  void run(const Piece& piece, const AdamwArgs& optimizer);
  void clear_gradients();
  View nll_sum() const;    // (1) f64, of the outcome
  View grad_norm() const;  // (1) f32, of the outcome

  Context& ctx_;
  State state_;
  NamedTensors low_;  // the matrices in the type that the model computes with; empty if that is f32
  LanguageModel model_;
  NamedTensors gradients_, activations_;
  ModelWeights gradient_weights_;
  std::vector<AdamwTensor> tensors_;
  int64_t tokens_;
  Feed feed_;
  std::shared_ptr<void> outcome_;  // an Outcome on the device
  Fetch fetch_;
  std::list<RecordedPiece> recordings_;  // the last used first
  OptimizerSettings optimizer_;          // in them
  int64_t scored_ = 0;                   // tokens of the update that was started
};

}  // namespace mamba3
