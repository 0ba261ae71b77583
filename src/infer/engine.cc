#include "infer/engine.h"

#include <algorithm>
#include <numeric>
#include <tuple>

#include "core/error.h"
#include "core/memory.h"
#include "ops/cross_entropy.h"

namespace mamba3 {

namespace {

using Tokens = std::span<const int32_t>;  // of one sequence

// The rows of ids (B, T).
std::vector<Tokens> rows_of(const View& ids, int64_t sequences) {
  if (ids.rank != 2 || ids.dim(0) != sequences || ids.dim(1) == 0) {
    input_error("token ids: got shape {}, want ({}, T) with at least one token", ids.shape(),
                sequences);
  }
  std::vector<Tokens> rows;
  for (int64_t b = 0; b < sequences; ++b) {
    rows.emplace_back(ids.select(0, b).as<int32_t>(), static_cast<size_t>(ids.dim(1)));
  }
  return rows;
}

void check_ids(std::span<const Tokens> sequences, int64_t vocab) {
  for (size_t b = 0; b < sequences.size(); ++b) {
    for (size_t t = 0; t < sequences[b].size(); ++t) {
      const int32_t id = sequences[b][t];
      if (id >= 0 && id < vocab) continue;
      const std::string sequence = sequences.size() > 1 ? fmt::format(" of sequence {}", b) : "";
      input_error("token id {} at position {}{} is out of range: this model knows 0 to {}", id, t,
                  sequence, vocab - 1);
    }
  }
}

// What of a draw is recorded besides addresses.
auto settings_of(const SampleArgs& args) {
  return std::tuple(args.vocab, args.temperature, args.top_k, args.top_p, args.min_p, args.seed,
                    args.position, args.first_row);
}

std::vector<int32_t> all_rows(int64_t rows) {
  std::vector<int32_t> out(static_cast<size_t>(rows));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

}  // namespace

StateTypes state_types(const LanguageModel& model, std::string_view ssm) {
  const Placement placement = placement_of(model);
  if (ssm != "f32" && ssm != "bf16") {
    input_error("unknown type '{}' of the state: use f32 or bf16", ssm);
  }
  if (ssm == "bf16" && placement.device == Device::cpu) {
    input_error("on the CPU the state is f32: leave --state-dtype bf16 out");
  }
  return {.ssm = ssm == "bf16" ? DType::bf16 : DType::f32, .cache = placement.dtype};
}

std::vector<std::vector<ReadPart>> plan_reading(std::span<const int64_t> lengths, int64_t most) {
  std::vector<std::vector<ReadPart>> forwards;
  int64_t room = 0;  // in the last of them
  for (int64_t b = 0; b < std::ssize(lengths); ++b) {
    const int64_t length = lengths[static_cast<size_t>(b)];
    for (int64_t begin = 0; begin < length; begin += most) {
      const int64_t tokens = std::min(most, length - begin);
      if (tokens > room) {
        forwards.emplace_back();
        room = most;
      }
      forwards.back().push_back({b, begin, tokens});
      room -= tokens;
    }
  }
  return forwards;
}

Engine::Engine(const LanguageModel& model, int64_t sequences, int threads,
               const StateTypes& state_types)
    : model_(model),
      placement_(placement_of(model)),
      context_(threads, placement_.device),
      states_(context_, model.config, sequences, 0, state_types),
      batch_(states_.select(all_rows(sequences))),
      drawn_(placement_.device, static_cast<size_t>(sequences) * sizeof(int32_t)) {
  const int64_t tokens = std::max(piece_tokens(), sequences);
  buffers_ =
      allocate({{.name = "hidden", .dims = {sequences, model.config.D}, .dtype = placement_.dtype},
                {.name = "aside", .dims = {sequences, model.config.D}, .dtype = placement_.dtype},
                {.name = "ids", .dims = {tokens}, .dtype = DType::i32},
                {.name = "cu_seqlens", .dims = {sequences + 1}, .dtype = DType::i32},
                {.name = "targets", .dims = {tokens}, .dtype = DType::i32},
                {.name = "nll", .dims = {tokens}}},
               placement_.device);
}

void Engine::reserve(int64_t tokens) {
  if (!states_.reserve(tokens)) return;
  batch_ = states_.select(batch_.rows);
  forget_recordings();
}

void Engine::select(std::span<const int32_t> rows) {
  StateBatch selected = states_.select(rows);
  put_aside();
  batch_ = std::move(selected);
  forget_recordings();
  for (size_t b = 0; b < batch_.rows.size(); ++b) {
    copy(context_, buffers_.at("aside").select(0, batch_.rows[b]),
         last_hidden().select(0, static_cast<int64_t>(b)));
  }
}

void Engine::put_aside() {
  for (size_t b = 0; b < batch_.rows.size(); ++b) {
    copy(context_, last_hidden().select(0, static_cast<int64_t>(b)),
         buffers_.at("aside").select(0, batch_.rows[b]));
  }
}

void Engine::fork(int32_t from, int32_t to) {
  if (std::find(batch_.rows.begin(), batch_.rows.end(), to) != batch_.rows.end()) {
    input_error("row {} is selected: it cannot become a copy", to);
  }
  put_aside();
  states_.copy(from, to);
  copy(context_, buffers_.at("aside").select(0, from), buffers_.at("aside").select(0, to));
}

void Engine::forget_recordings() {
  draw_graph_.clear();
  append_graph_.clear();
}

void Engine::set_length(int64_t tokens) {
  for (const int32_t row : batch_.rows) states_.set_length(row, tokens);
  states_.place_lengths(batch_);
}

void Engine::reset() {
  states_.reset();
  states_.place_lengths(batch_);
}

int64_t Engine::piece_tokens() const {
  return placement_.device == Device::cpu ? kPieceTokens : kGpuPieceTokens;
}

// For so many tokens of each sequence.
void Engine::prepare(int64_t tokens) {
  resolve(sequences() * tokens);
  int64_t longest = 0;
  for (const int32_t row : batch_.rows) longest = std::max(longest, states_.length(row));
  reserve(longest + tokens);
}

// The activations of M tokens of all sequences.
void Engine::resolve(int64_t M) {
  if (M > activation_capacity_) {
    synchronize(context_);  // before the old ones go
    activation_tensors_ = allocate(
        activation_table(model_.config, M, Keep::nothing, placement_.dtype), placement_.device);
    activation_capacity_ = M;
    activations_ = {};
    forget_recordings();
  }
  if (activations_.blocks.empty() || activations_.hidden.dim(0) != M) {
    activations_ = resolve_activations(model_.config, activation_tensors_, M);
  }
}

void Engine::check_started() const {
  for (const int32_t row : batch_.rows) {
    if (states_.length(row) == 0) input_error("there are no logits before the first token");
  }
}

View Engine::forward(const View& ids) {
  const int64_t B = ids.dim(0), t = ids.dim(1), D = model_.config.D;
  prepare(t);
  piece_ids_.resize(static_cast<size_t>(B * t));
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* row = ids.select(0, b).as<int32_t>();
    std::copy(row, row + t, piece_ids_.begin() + b * t);
  }
  const View piece = ids_buffer(B * t);
  copy(context_, view_of(piece_ids_.data(), {B * t}), piece);
  model_forward(context_, model_,
                {.ids = piece.reshape({B, t}), .activations = activations_, .state = &batch_});
  states_.advance(batch_, t);
  return activations_.hidden.reshape({B, t, D});
}

void Engine::read(std::span<const Tokens> prompts) {
  if (std::ssize(prompts) != sequences())
    input_error("got {} prompts for {} sequences", prompts.size(), sequences());
  check_ids(prompts, model_.config.vocab);
  std::vector<int64_t> lengths;
  int64_t longest = 0;
  for (size_t b = 0; b < prompts.size(); ++b) {
    if (prompts[b].empty()) input_error("no tokens for sequence {}: give at least one", b);
    lengths.push_back(std::ssize(prompts[b]));
    longest = std::max(longest, length(b) + std::ssize(prompts[b]));
  }
  reserve(longest);
  for (const std::vector<ReadPart>& parts : plan_reading(lengths, piece_tokens())) {
    read_together(prompts, parts);
  }
}

// One forward: (n, T) if the parts are of equal lengths, so that no op has to look up where they
// begin, otherwise packed.
void Engine::read_together(std::span<const Tokens> prompts, std::span<const ReadPart> parts) {
  const int64_t n = std::ssize(parts), first = parts.front().sequence;
  std::vector<int64_t> lengths;
  piece_ids_.clear();
  piece_cu_seqlens_.assign(1, 0);
  for (const ReadPart& part : parts) {
    const auto begin = prompts[static_cast<size_t>(part.sequence)].begin() + part.begin;
    lengths.push_back(part.tokens);
    piece_ids_.insert(piece_ids_.end(), begin, begin + part.tokens);
    piece_cu_seqlens_.push_back(static_cast<int32_t>(piece_ids_.size()));
  }
  const int64_t M = std::ssize(piece_ids_), T = lengths.front();
  const bool even = std::count(lengths.begin(), lengths.end(), T) == n;
  resolve(M);
  const View ids = ids_buffer(M);
  copy(context_, view_of(piece_ids_.data(), {M}), ids);
  const View cu_seqlens = even ? View{} : buffers_.at("cu_seqlens").slice(0, 0, n + 1);
  if (!even) copy(context_, view_of(piece_cu_seqlens_.data(), {n + 1}), cu_seqlens);
  const StateBatch batch = batch_.slice(first, first + n);
  const Stream stream =
      model_stream(context_, model_,
                   {.ids = even ? ids.reshape({n, T}) : ids.reshape({1, M}),
                    .cu_seqlens = cu_seqlens,
                    .activations = activations_,
                    .state = &batch,
                    .host_cu_seqlens = even ? Tokens{} : Tokens{piece_cu_seqlens_}});
  const View hidden = last_hidden().slice(0, first, first + n);
  if (even) {
    states_.advance(batch, T);
    const auto last = [&](const View& rows) {
      return rows.reshape({n, T, rows.dim(1)}).select(1, T - 1);
    };
    return model_hidden(context_, model_, {last(stream.residual), last(stream.delta)}, hidden);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = piece_cu_seqlens_[static_cast<size_t>(i + 1)];
    const auto last = [&](const View& rows) { return rows.slice(0, end - 1, end); };
    model_hidden(context_, model_, {last(stream.residual), last(stream.delta)},
                 hidden.slice(0, i, i + 1));
  }
  states_.advance(batch, lengths);
}

void Engine::run(const View& ids, const OnPiece& on_piece) {
  check_ids(rows_of(ids, sequences()), model_.config.vocab);
  const int64_t T = ids.dim(1), B = sequences();
  const int64_t piece = std::max<int64_t>(1, piece_tokens() / B);
  for (int64_t begin = 0; begin < T; begin += piece) {
    const int64_t t = std::min(piece, T - begin);
    const View hidden = forward(ids.slice(1, begin, begin + t));
    on_piece(hidden, begin, t);
    if (begin + t < T) continue;
    for (int64_t b = 0; b < B; ++b) {
      copy(context_, hidden.select(0, b).select(0, t - 1), last_hidden().select(0, b));
    }
  }
}

// logits (M, V) in host memory from hidden (M, D) where the model is.
void Engine::logits_to_host(const View& hidden, const View& logits) {
  if (placement_.device == Device::cpu) return model_logits(context_, model_, hidden, logits);
  const int64_t M = logits.dim(0), V = logits.dim(1);
  ScratchScope scope(context_.scratch);
  const View here =
      make_view(scope.take<float>(M * V).data(), DType::f32, {M, V}, placement_.device);
  model_logits(context_, model_, hidden, here);
  for (int64_t m = 0; m < (logits.contiguous() ? 0 : M); ++m) {
    copy(context_, here.select(0, m), logits.select(0, m));
  }
  if (logits.contiguous()) copy(context_, here, logits);
}

void Engine::append(const View& ids, const View& logits) {
  if (logits.empty()) return read(rows_of(ids, sequences()));
  run(ids, [&](const View& hidden, int64_t begin, int64_t t) {
    if (t == 1) {  // one product for the batch
      return logits_to_host(hidden.select(1, 0), logits.select(1, begin));
    }
    for (int64_t b = 0; b < sequences(); ++b) {
      const View to = logits.select(0, b).slice(0, begin, begin + t);
      for (int64_t i = 0; i < t; i += kPieceTokens) {  // a few, since each is a whole vocabulary
        const int64_t end = std::min(t, i + kPieceTokens);
        logits_to_host(hidden.select(0, b).slice(0, i, end), to.slice(0, i, end));
      }
    }
  });
}

void Engine::last_logits(const View& logits) {
  check_started();
  logits_to_host(last_hidden(), logits);
}

// Draws to the front of the buffer of ids.
void Engine::draw_ids(SampleArgs args) {
  const int64_t B = sequences(), V = model_.config.vocab_padded;
  const Device device = placement_.device;
  ScratchScope scope(context_.scratch);
  args.logits = make_view(scope.take<float>(B * V).data(), DType::f32, {B, V}, device);
  model_logits(context_, model_, last_hidden(), args.logits);
  if (!args.history.empty()) {
    const View host = args.history;
    args.history = make_view(scope.take<int32_t>(host.size()).data(), DType::i32,
                             {host.dim(0), host.dim(1)}, device);
    copy(context_, host, args.history);
  }
  args.out = ids_buffer(B);
  sample(context_, args);
}

// Waits for what was drawn, and nothing after it.
std::span<const int32_t> Engine::drawn_ids() {
  const std::span<const int32_t> tokens(static_cast<const int32_t*>(drawn_.wait()),
                                        static_cast<size_t>(sequences()));
  for (const int32_t token : tokens) {
    if (token < 0) error("the logits are not finite: the weights or the state are damaged");
  }
  return tokens;
}

std::vector<int32_t> Engine::draw(const SampleArgs& args) {
  check_started();
  draw_ids(args);
  drawn_.start(context_, ids_buffer(sequences()));
  const std::span<const int32_t> tokens = drawn_ids();
  return {tokens.begin(), tokens.end()};
}

// The tokens drawn last, which only the device has to know. A row without a largest logit has drawn
// an id that does not exist, which the GPU's embedding takes: drawn_ids() is where that shows.
void Engine::append_drawn() {
  const int64_t B = sequences();
  append_graph_.run(context_, [&] {
    model_forward(
        context_, model_,
        {.ids = ids_buffer(B).reshape({B, 1}), .activations = activations_, .state = &batch_});
    states_.advance_on_device(batch_, 1);
    copy(context_, activations_.hidden, last_hidden());
  });
  states_.advance_here(batch_, 1);
}

void Engine::decode(const SampleArgs& args, const OnTokens& on_tokens) {
  check_started();
  prepare(1);
  if (settings_of(args) != settings_of(recorded_draw_)) draw_graph_.clear();
  recorded_draw_ = args;
  SampleArgs here = args;
  here.step = batch_.indices.at("positions");
  here.rows = batch_.indices.at("rows");
  if (args.history.empty()) {
    draw_graph_.run(context_, [&] { draw_ids(here); });
  } else {
    draw_ids(here);  // not recorded: the history comes from host memory and grows
  }
  drawn_.start(context_, ids_buffer(sequences()));
  // The GPU goes on while the host looks at the tokens. The CPU would only show them later.
  const bool at_once = placement_.device != Device::cpu;
  if (at_once) append_drawn();
  const std::span<const int32_t> tokens = drawn_ids();
  try {
    on_tokens(tokens);
  } catch (...) {
    if (!at_once) append_drawn();
    throw;
  }
  if (!at_once) append_drawn();
}

void Engine::score(const View& ids, const View& targets, const View& nll) {
  run(ids, [&](const View& hidden, int64_t begin, int64_t t) {
    const View targets_here = buffers_.at("targets").slice(0, 0, t);
    const View nll_here = buffers_.at("nll").slice(0, 0, t);
    for (int64_t b = 0; b < sequences(); ++b) {
      copy(context_, targets.select(0, b).slice(0, begin, begin + t), targets_here);
      cross_entropy(context_, {.hidden = hidden.select(0, b),
                               .weight = model_.weights.head,
                               .targets = targets_here,
                               .vocab = model_.config.vocab,
                               .nll = nll_here});
      copy(context_, nll_here, nll.select(0, b).slice(0, begin, begin + t));
    }
  });
}

}  // namespace mamba3
