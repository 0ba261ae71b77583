#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/context.h"
#include "model/block.h"
#include "model/config.h"
#include "model/state.h"
#include "model/tensors.h"

namespace mamba3 {

// Every parameter, or every gradient, by name once and then by member.
struct ModelWeights {
  View embedding;  // (V, D)
  std::vector<BlockWeights> blocks;
  View norm_f;  // (D)
  View head;    // (V, D); the embedding itself when tied, so its gradient gets both contributions
};

// Resolves the names of parameter_table(). Throws InputError naming a missing tensor.
ModelWeights resolve_weights(const Config& config, const NamedTensors& tensors);

// A model is const once made; sessions and trainers own state, activations and gradients.
struct LanguageModel {
  Config config;
  NamedTensors tensors;  // owns the memory of `weights`
  ModelWeights weights;
};

// Takes the parameters as a checkpoint or initialisation gives them. Matrices stay as they are
// (views into a mapped file, or f32 that an optimiser updates in place); other tensors that are not
// f32 are converted once.
LanguageModel make_language_model(const Config& config, const NamedTensors& tensors);

// Where a model is, and the type of its activations there.
Placement placement_of(const LanguageModel& model);

// The same on the context's device: a copy whose matrices have the placement's type. On the CPU
// the matrices stay as they are.
LanguageModel place_language_model(Context& ctx, const LanguageModel& model, DType dtype);

// Whether a parameter is a matrix, which may have any of the three floating types; the others are
// f32.
bool is_matrix(std::string_view name);

// What a forward keeps for the backward: all that it needs, or only the stream before each layer,
// from which the backward recomputes the rest layer by layer: a forward more, for a fraction of the
// memory.
enum class Keep : uint8_t { nothing, for_backward, streams };

// What a forward over `tokens` = B T tokens writes (and a backward uses). Keep::nothing:
// one set of Lifetime::scratch tensors. Keep::for_backward: layers.I.{residual, rstd, normed, proj,
// conv, gated, y, lse, residual2, rstd2, normed2, fc1, act}, as far as the layer has them, of
// Lifetime::activation for each layer, and the scratch of the backward. Keep::streams: of these only layers.I.residual, and one scratch set
// block.{rstd, ...} of the others.
// The stream, its gradient, rstd and lse are f32, the others of the type given. Rows of proj, conv
// and their gradients have columns beyond those of the layer, so that they begin at multiples of 64 elements.
std::vector<TensorSpec> activation_table(const Config& config, int64_t tokens, Keep keep,
                                         DType dtype = DType::f32);

struct ModelActivations {
  std::vector<BlockActivations> blocks;
  View residual;  // (M, D), the stream that norm_f reads
  View rstd;      // (M), empty when not kept
  View hidden;    // (M, D), after norm_f: the input of the head
  // Scratch of the backward; empty with Keep::nothing.
  View d_hidden;       // (M, D)
  View d_stream;       // (M, D) f32
  View d_stream_copy;  // (M, D), see StreamGradient; empty if the activations are f32
};

// The first `tokens` rows of an allocated activation_table(): a larger allocation serves any
// smaller call.
ModelActivations resolve_activations(const Config& config, const NamedTensors& tensors,
                                     int64_t tokens);

struct ModelForwardArgs {
  View ids;              // (B, T) i32
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
  const ModelActivations& activations;  // for B T tokens
  // Carry on from these states and leave the new ones (the caller advances the lengths); null:
  // sequences start here and nothing is left.
  const StateBatch* state = nullptr;
  // With cu_seqlens and a state: cu_seqlens in host memory, for layers that take the sequences one
  // by one.
  std::span<const int32_t> host_cu_seqlens = {};
  // For tests and tools: copies of the stream after each layer, (B T, D) f32 each, or empty.
  std::vector<View> residuals = {};
};

// activations.hidden = norm_f(blocks(embedding(ids))). Ids out of range throw InputError.
void model_forward(Context& ctx, const LanguageModel& model, const ModelForwardArgs& args);

// The same in two parts, for who wants the hidden rows of a few tokens only:
// blocks(embedding(ids)), which lives in the activations, and hidden (M, D) = norm_f of all or some
// of its rows.
Stream model_stream(Context& ctx, const LanguageModel& model, const ModelForwardArgs& args);
void model_hidden(Context& ctx, const LanguageModel& model, const Stream& rows, const View& hidden);

// logits (M, V) f32 = hidden (M, D) head^T. Columns from config.vocab on are padding: not to be
// sampled or scored.
void model_logits(Context& ctx, const LanguageModel& model, const View& hidden, const View& logits);

struct ModelLossArgs {
  const ModelActivations& activations;  // of the forward
  View targets;                         // (M) i32, -1: not scored
  View nll;                             // (M) f32, nats
  // Present: the gradient of scale * sum(nll) goes to activations.d_hidden, and the head's part of
  // it is accumulated into gradients->head.
  const ModelWeights* gradients = nullptr;
  View scale = {};  // (1) f32, or empty: 1
};

void model_loss(Context& ctx, const LanguageModel& model, const ModelLossArgs& args);

struct ModelBackwardArgs {
  View ids;                             // as in the forward, which kept everything and had no state
  View cu_seqlens = {};                 // likewise
  const ModelActivations& activations;  // fc1 of the layers is overwritten
  const ModelWeights& gradients;        // f32, accumulated into
};

// From activations.d_hidden (see model_loss) to the gradients of all parameters.
void model_backward(Context& ctx, const LanguageModel& model, const ModelBackwardArgs& args);

}  // namespace mamba3
