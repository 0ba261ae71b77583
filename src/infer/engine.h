#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "core/context.h"
#include "core/fetch.h"
#include "core/graph.h"
#include "model/language_model.h"
#include "model/state.h"
#include "ops/sample.h"

namespace mamba3 {

// The types of a state where the model is: ssm as asked ("f32" or, on the GPU, "bf16"; InputError
// for anything else), caches as the activations.
StateTypes state_types(const LanguageModel& model, std::string_view ssm);

// Tokens [begin, begin + tokens) of one of several prompts.
struct ReadPart {
  int64_t sequence = 0, begin = 0, tokens = 0;
  bool operator==(const ReadPart&) const = default;
};

// The forwards that read prompts of these lengths with at most `most` tokens each: consecutive
// prompts, as many as there is room for. Only one longer than that is cut, and then where it would
// be alone.
std::vector<std::vector<ReadPart>> plan_reading(std::span<const int64_t> lengths, int64_t most);

// Runs a model over a batch of sequences that grow together, and owns what that needs: threads,
// states, activations. Calls of any length run in pieces that continue the states, so memory does
// not grow with the length; a call of one token a sequence takes a step. After the first call of a
// length nothing is allocated any more.
class Engine {
 public:
  // Tokens of all sequences that run at once, at most, which bounds the activations: on the CPU
  // they stay in the caches, a GPU wants many to fill it.
  static constexpr int64_t kPieceTokens = 1024;
  static constexpr int64_t kGpuPieceTokens = 16384;

  // Runs where the model is, which must outlive the engine. 0 threads: as many as the process may
  // use.
  explicit Engine(const LanguageModel& model, int64_t sequences = 1, int threads = 0,
                  const StateTypes& state_types = {});

  // All views of the calls are in host memory.
  // Appends T tokens to each sequence: ids (B, T) i32. With logits (B, T, V) f32 present, also
  // writes what the model expects after each of them. Throws InputError for an id that does not
  // exist, with its position, before anything is changed.
  void append(const View& ids, const View& logits = {});
  // Appends prompts[b], at least one token, to sequence b: as many of them in one forward as its
  // tokens allow. Each is what it would be alone, to rounding. Throws as append().
  void read(std::span<const std::span<const int32_t>> prompts);

  // What the model expects after the tokens so far: logits (B, V) f32. There must be a token.
  void last_logits(const View& logits);

  // Draws the next token of each sequence, with the filters, numbers, vocab and history (B, L), in
  // host memory, of args. Throws Error for logits that have no largest one.
  std::vector<int32_t> draw(const SampleArgs& args);

  // The same, and appends the tokens. Their rows and lengths are the engine's: args leaves step,
  // rows and, unless it wants other draws, position and first_row alone. on_tokens gets the tokens
  // as soon as they are known; on the GPU their forward is under way by then, and what it looks at
  // takes no time of the GPU's. They are appended even if on_tokens throws.
  using OnTokens = std::function<void(std::span<const int32_t> tokens)>;
  void decode(const SampleArgs& args, const OnTokens& on_tokens);

  // Appends ids (B, T) and writes the nats of targets (B, T) i32 (-1: not scored) to nll (B, T)
  // f32.
  void score(const View& ids, const View& targets, const View& nll);

  // The engine has a row for every sequence it was made for. Calls are for the selected rows, in
  // their order: at first for all. The other rows stay as they are; so sequences that are decoded
  // together leave when they end. Throws InputError for a row that does not exist or is given
  // twice.
  void select(std::span<const int32_t> rows);
  // Makes row `to`, which must not be selected, a copy of row `from`.
  void fork(int32_t from, int32_t to);

  void reset();  // all rows back to no tokens
  // Tokens so far of a selected sequence.
  int64_t length(size_t b = 0) const { return states_.length(batch_.rows.at(b)); }
  int64_t sequences() const { return std::ssize(batch_.rows); }  // selected
  const LanguageModel& model() const { return model_; }
  Context& context() { return context_; }

  // Makes room for this many tokens a sequence at once, rather than as they come.
  void reserve(int64_t tokens);

  // What a saved session holds: the states, and `hidden` (B, D), the last token's input of the
  // head, where the model is. Whoever writes to them reserves before and sets the length
  // afterwards.
  const StatePool& states() const { return states_; }
  View last_hidden() const { return buffers_.at("hidden").slice(0, 0, sequences()); }
  void set_length(int64_t tokens);

 private:
  // hidden (B, t, D) of positions [begin, begin + t) of the call.
  using OnPiece = std::function<void(const View& hidden, int64_t begin, int64_t t)>;
  void run(const View& ids, const OnPiece& on_piece);
  View forward(const View& ids);
  void read_together(std::span<const std::span<const int32_t>> prompts,
                     std::span<const ReadPart> parts);
  int64_t piece_tokens() const;
  void prepare(int64_t tokens);
  void resolve(int64_t tokens);
  void check_started() const;
  void put_aside();

  View ids_buffer(int64_t tokens) const { return buffers_.at("ids").slice(0, 0, tokens); }
  void draw_ids(SampleArgs args);
  std::span<const int32_t> drawn_ids();
  void append_drawn();
  void forget_recordings();

  void logits_to_host(const View& hidden, const View& logits);

  const LanguageModel& model_;
  Placement placement_;
  Context context_;
  StatePool states_;
  StateBatch batch_;
  // hidden (B, D) of the selected sequences; aside (rows, D), the same of the others by row; and
  // ids, targets, nll and, of unequal sequences, cu_seqlens of a piece.
  NamedTensors buffers_;
  std::vector<int32_t> piece_ids_, piece_cu_seqlens_;
  NamedTensors activation_tensors_;
  int64_t activation_capacity_ = 0;
  ModelActivations activations_;
  // A decode step on the GPU, in two parts: the tokens are fetched between them.
  Graph draw_graph_, append_graph_;
  SampleArgs recorded_draw_;  // its settings
  Fetch drawn_;
};

}  // namespace mamba3
