#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/context.h"
#include "model/config.h"
#include "model/tensors.h"
#include "ops/attention.h"
#include "ops/delta.h"
#include "ops/mixer.h"
#include "ops/short_conv.h"

namespace mamba3 {

// The tensors that `rows` sequences carry from call to call, Lifetime::state:
//   layers.I.angle (rows, H, S)    layers.I.ssm (rows, H, P, N)
//   layers.I.k     (rows, R, H, N) layers.I.v   (rows, H, P)     mamba3 (angle where S > 0), mamba2
//   layers.I.delta (rows, H, V, K)                                gated_deltanet
//   layers.I.conv  (rows, W - 1, channels)                        where there is a convolution
//   layers.I.cache_k, layers.I.cache_v (rows, T_max, Hkv, d)      attention, for T_max tokens
// All f32, but on the GPU ssm and the caches may be bf16.
struct StateTypes {
  DType ssm = DType::f32;
  DType cache = DType::f32;
};
std::vector<TensorSpec> state_table(const Config& config, int64_t rows, int64_t T_max,
                                    const StateTypes& types = {});

// Bytes of one sequence that holds `tokens` tokens. Without attention layers the number of tokens
// does not matter.
int64_t state_bytes(const Config& config, int64_t tokens);

// What one layer carries: exactly one of the first three is present.
struct BlockState {
  MixerState mixer;
  DeltaState delta;
  AttentionCache attention;
  ShortConvState conv;
};

// The states of the sequences of one batch: views into a pool, with the row and the length of each
// sequence. Valid until the pool grows.
struct StateBatch {
  std::vector<int32_t> rows;  // (B), all different
  // On the device: rows (B) i32; lengths (B) i32 and positions (B) i64, both the tokens so far.
  NamedTensors indices;
  std::vector<BlockState> blocks;

  // The sequences [begin, end): views into this batch, valid as long as it is.
  StateBatch slice(int64_t begin, int64_t end) const;
};

// Rows of state, one per sequence: a snapshot or a fork is a row copy. All rows start at zero, the
// start of a sequence.
class StatePool {
 public:
  // On the device of ctx, which must outlive the pool. T_max: tokens that the attention caches have
  // room for at first (see reserve).
  StatePool(Context& ctx, const Config& config, int64_t rows, int64_t T_max = 0,
            const StateTypes& types = {});

  int64_t rows() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t length(int64_t row) const { return lengths_.at(static_cast<size_t>(row)); }
  void set_length(int64_t row, int64_t tokens);

  // Makes room for `tokens` tokens in every row, at least doubling the caches when it grows them.
  // Returns whether it did: then selected batches are no longer valid. Never without attention.
  bool reserve(int64_t tokens);

  void reset(int64_t row);
  void reset();  // all rows
  void copy(int64_t from, int64_t to);

  // The rows as the batch of a forward call. Throws InputError for a row out of range or given
  // twice.
  StateBatch select(std::span<const int32_t> rows) const;
  // After a call that appended tokens[b] to sequence b.
  void advance(const StateBatch& batch, std::span<const int64_t> tokens);
  // After a call that appended `tokens` to every sequence of the batch. Counts here and on the
  // device; who replays recorded ops does the one for every replay and records the other.
  void advance(const StateBatch& batch, int64_t tokens);
  void advance_here(const StateBatch& batch, int64_t tokens);
  void advance_on_device(const StateBatch& batch, int64_t tokens);

  // Sets the counters on the device to the lengths here.
  void place_lengths(const StateBatch& batch) const;

  const NamedTensors& tensors() const { return tensors_; }

 private:
  Context* ctx_;
  Config config_;
  StateTypes types_;
  int64_t T_max_ = 0;
  std::vector<int64_t> lengths_;
  NamedTensors tensors_;
};

}  // namespace mamba3
