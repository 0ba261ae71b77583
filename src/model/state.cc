#include "model/state.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "core/error.h"

namespace mamba3 {

namespace {

std::string tensor_name(int64_t layer, std::string_view what) {
  return fmt::format("layers.{}.{}", layer, what);
}

bool has_attention(const Config& config) {
  return !config.attention_layers.empty();
}

BlockState resolve_block_state(const Config& config, const NamedTensors& tensors, int64_t layer) {
  const auto view = [&](std::string_view what) { return tensors.at(tensor_name(layer, what)); };
  BlockState state;
  if (config.is_attention(layer)) {
    state.attention.k = view("cache_k");
    state.attention.v = view("cache_v");
  } else {
    state.mixer.angle = view("angle");
    state.mixer.ssm = view("ssm");
    state.mixer.k_prev = view("k");
    state.mixer.v_prev = view("v");
  }
  return state;
}

// Copies what fits of `from` into `to`, both dense and of equal dims apart from T_max in axis 1.
void copy_cache(const View& from, const View& to) {
  const int64_t bytes = from.stride(0) * size_of(from.dtype);
  for (int64_t row = 0; row < from.dim(0); ++row) {
    std::memcpy(to.select(0, row).data, from.select(0, row).data, static_cast<size_t>(bytes));
  }
}

}  // namespace

std::vector<TensorSpec> state_table(const Config& config, int64_t rows, int64_t T_max) {
  const MixerShape& s = config.mixer;
  const AttentionConfig& a = config.attention;
  std::vector<TensorSpec> table;
  const auto add = [&](int64_t layer, std::string_view what, std::vector<int64_t> dims) {
    table.push_back(
        {.name = tensor_name(layer, what), .dims = std::move(dims), .lifetime = Lifetime::state});
  };
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    if (config.is_attention(layer)) {
      add(layer, "cache_k", {rows, T_max, a.Hkv, a.d});
      add(layer, "cache_v", {rows, T_max, a.Hkv, a.d});
    } else {
      add(layer, "angle", {rows, s.H, s.S});
      add(layer, "ssm", {rows, s.H, s.P, s.N});
      add(layer, "k", {rows, s.R, s.H, s.N});
      add(layer, "v", {rows, s.H, s.P});
    }
  }
  return table;
}

int64_t state_bytes(const Config& config, int64_t tokens) {
  int64_t bytes = 0;
  for (const TensorSpec& spec : state_table(config, 1, tokens)) {
    int64_t size = size_of(spec.dtype);
    for (const int64_t dim : spec.dims) size *= dim;
    bytes += size;
  }
  return bytes;
}

StatePool::StatePool(const Config& config, int64_t rows, int64_t T_max)
    : config_(config),
      T_max_(has_attention(config) ? std::max<int64_t>(T_max, 1) : 0),
      lengths_(static_cast<size_t>(rows), 0),
      tensors_(allocate(state_table(config, rows, T_max_))) {}

void StatePool::set_length(int64_t row, int64_t tokens) {
  lengths_.at(static_cast<size_t>(row)) = tokens;
}

bool StatePool::reserve(int64_t tokens) {
  if (!has_attention(config_) || tokens <= T_max_) return false;
  const int64_t T_max = std::max(tokens, 2 * T_max_);
  // The mixers' tensors are small beside the caches: one allocation holds all, as at the start.
  const NamedTensors grown = allocate(state_table(config_, rows(), T_max));
  for (const std::string& name : tensors_.names()) copy_cache(tensors_.at(name), grown.at(name));
  tensors_ = grown;
  T_max_ = T_max;
  return true;
}

void StatePool::reset(int64_t row) {
  for (const std::string& name : tensors_.names()) {
    const View view = tensors_.at(name).select(0, row);
    if (view.size() > 0) std::memset(view.data, 0, static_cast<size_t>(view.bytes()));
  }
  set_length(row, 0);
}

void StatePool::copy(int64_t from, int64_t to) {
  if (from == to) return;
  for (const std::string& name : tensors_.names()) {
    const View source = tensors_.at(name).select(0, from), target = tensors_.at(name).select(0, to);
    if (source.size() > 0)
      std::memcpy(target.data, source.data, static_cast<size_t>(source.bytes()));
  }
  set_length(to, length(from));
}

StateBatch StatePool::select(std::span<const int32_t> selected) const {
  StateBatch batch;
  std::set<int32_t> seen;
  for (const int32_t row : selected) {
    if (row < 0 || row >= rows()) {
      input_error("[state] row {} is out of range: the pool has {}", row, rows());
    }
    if (!seen.insert(row).second) input_error("[state] row {} is given twice", row);
    batch.rows.push_back(row);
    batch.lengths.push_back(static_cast<int32_t>(length(row)));
  }
  const int64_t B = static_cast<int64_t>(batch.rows.size());
  const View row_view = view_of(batch.rows.data(), {B});
  const View length_view = view_of(batch.lengths.data(), {B});
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
    BlockState state = resolve_block_state(config_, tensors_, layer);
    state.mixer.rows = state.attention.rows = row_view;
    state.attention.lengths = length_view;
    batch.blocks.push_back(state);
  }
  return batch;
}

void StatePool::advance(StateBatch& batch, int64_t tokens) {
  for (size_t i = 0; i < batch.rows.size(); ++i) {
    set_length(batch.rows[i], length(batch.rows[i]) + tokens);
    batch.lengths[i] = static_cast<int32_t>(length(batch.rows[i]));
  }
}

}  // namespace mamba3
