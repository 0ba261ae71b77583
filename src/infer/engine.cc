#include "infer/engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/error.h"
#include "ops/cross_entropy.h"

namespace mamba3 {

namespace {

void check_ids(const View& ids, int64_t sequences, int64_t vocab) {
  if (ids.rank != 2 || ids.dim(0) != sequences || ids.dim(1) == 0) {
    input_error("token ids: got shape {}, want ({}, T) with at least one token", ids.shape(),
                sequences);
  }
  for (int64_t b = 0; b < sequences; ++b) {
    const View row = ids.select(0, b);
    for (int64_t t = 0; t < row.dim(0); ++t) {
      const int32_t id = row.as<int32_t>()[t];
      if (id >= 0 && id < vocab) continue;
      const std::string sequence = sequences > 1 ? fmt::format(" of sequence {}", b) : "";
      input_error("token id {} at position {}{} is out of range: this model knows 0 to {}", id, t,
                  sequence, vocab - 1);
    }
  }
}

std::vector<int32_t> all_rows(int64_t rows) {
  std::vector<int32_t> out(static_cast<size_t>(rows));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace

Engine::Engine(const LanguageModel& model, int64_t sequences, int threads)
    : model_(model),
      context_(threads),
      states_(model.config, sequences),
      batch_(states_.select(all_rows(sequences))),
      last_hidden_(static_cast<size_t>(sequences * model.config.D)) {}

View Engine::last_hidden() {
  return view_of(last_hidden_.data(), {sequences(), model_.config.D});
}

void Engine::reserve(int64_t tokens) {
  if (states_.reserve(tokens)) batch_ = states_.select(all_rows(sequences()));
}

void Engine::set_length(int64_t tokens) {
  for (int64_t row = 0; row < sequences(); ++row) states_.set_length(row, tokens);
  batch_ = states_.select(all_rows(sequences()));
}

void Engine::reset() {
  for (int64_t row = 0; row < sequences(); ++row) states_.reset(row);
  set_length(0);
}

void Engine::prepare(int64_t tokens) {
  const int64_t M = sequences() * tokens;
  if (M > activation_capacity_) {
    activation_tensors_ = allocate(activation_table(model_.config, M, Keep::nothing));
    activation_capacity_ = M;
    activations_ = {};
  }
  if (activations_.blocks.empty() || activations_.hidden.dim(0) != M) {
    activations_ = resolve_activations(model_.config, activation_tensors_, M);
  }
  reserve(length() + tokens);
}

View Engine::forward(const View& ids) {
  const int64_t B = ids.dim(0), t = ids.dim(1), D = model_.config.D;
  prepare(t);
  piece_ids_.resize(static_cast<size_t>(B * t));
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* row = ids.select(0, b).as<int32_t>();
    std::copy(row, row + t, piece_ids_.begin() + b * t);
  }
  model_forward(
      context_, model_,
      {.ids = view_of(piece_ids_.data(), {B, t}), .activations = activations_, .state = &batch_});
  states_.advance(batch_, t);
  return activations_.hidden.reshape({B, t, D});
}

void Engine::run(const View& ids, const OnPiece& on_piece) {
  check_ids(ids, sequences(), model_.config.vocab);
  const int64_t T = ids.dim(1), B = sequences(), D = model_.config.D;
  const int64_t piece = std::max<int64_t>(1, kPieceTokens / B);
  for (int64_t begin = 0; begin < T; begin += piece) {
    const int64_t t = std::min(piece, T - begin);
    const View hidden = forward(ids.slice(1, begin, begin + t));
    on_piece(hidden, begin, t);
    if (begin + t < T) continue;
    for (int64_t b = 0; b < B; ++b) {
      const float* last = hidden.select(0, b).select(0, t - 1).as<float>();
      std::copy(last, last + D, last_hidden_.begin() + b * D);
    }
  }
}

void Engine::append(const View& ids, const View& logits) {
  run(ids, [&](const View& hidden, int64_t begin, int64_t t) {
    if (logits.empty()) return;
    if (t == 1) {  // one product for the batch
      return model_logits(context_, model_, hidden.select(1, 0), logits.select(1, begin));
    }
    for (int64_t b = 0; b < sequences(); ++b) {
      model_logits(context_, model_, hidden.select(0, b),
                   logits.select(0, b).slice(0, begin, begin + t));
    }
  });
}

void Engine::last_logits(const View& logits) {
  if (length() == 0) input_error("there are no logits before the first token");
  model_logits(context_, model_, last_hidden(), logits);
}

void Engine::score(const View& ids, const View& targets, const View& nll) {
  run(ids, [&](const View& hidden, int64_t begin, int64_t t) {
    for (int64_t b = 0; b < sequences(); ++b) {
      cross_entropy(context_, {.hidden = hidden.select(0, b),
                               .weight = model_.weights.head,
                               .targets = targets.select(0, b).slice(0, begin, begin + t),
                               .vocab = model_.config.vocab,
                               .nll = nll.select(0, b).slice(0, begin, begin + t)});
    }
  });
}

}  // namespace mamba3
