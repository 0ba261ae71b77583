#include "model/state.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/memory.h"
#include "ops/increment.h"

namespace mamba3 {

namespace {

std::string tensor_name(int64_t layer, std::string_view what) {
  return fmt::format("layers.{}.{}", layer, what);
}

bool has_attention(const Config& config) {
  return config.has(LayerKind::attention);
}

// An absent tensor gives an empty view.
BlockState resolve_block_state(const NamedTensors& tensors, int64_t layer) {
  const auto view = [&](std::string_view what) { return tensors.find(tensor_name(layer, what)); };
  BlockState state;
  state.mixer.angle = view("angle");
  state.mixer.ssm = view("ssm");
  state.mixer.k_prev = view("k");
  state.mixer.v_prev = view("v");
  state.delta.delta = view("delta");
  state.conv.inputs = view("conv");
  state.attention.k = view("cache_k");
  state.attention.v = view("cache_v");
  return state;
}

// Sets what all parts of a layer's state have in common.
void set_rows(BlockState& state, const View& rows, const View& lengths) {
  state.mixer.rows = state.delta.rows = state.conv.rows = state.attention.rows = rows;
  state.attention.lengths = lengths;
}

// Copies `from` into the beginning of every row of `to`: dims are equal apart from T_max in axis 1.
void copy_rows(Context& ctx, const View& from, const View& to) {
  for (int64_t row = 0; row < from.dim(0); ++row) {
    copy(ctx, from.select(0, row), to.select(0, row).slice(0, 0, from.dim(1)));
  }
}

}  // namespace

std::vector<TensorSpec> state_table(const Config& config, int64_t rows, int64_t T_max,
                                    const StateTypes& types) {
  std::vector<TensorSpec> table;
  const auto add = [&](int64_t layer, std::string_view what, std::vector<int64_t> dims,
                       DType dtype = DType::f32) {
    table.push_back({.name = tensor_name(layer, what),
                     .dims = std::move(dims),
                     .dtype = dtype,
                     .lifetime = Lifetime::state});
  };
  const auto add_mixer = [&](int64_t layer, const MixerShape& s) {
    if (s.S > 0) add(layer, "angle", {rows, s.H, s.S});
    add(layer, "ssm", {rows, s.H, s.P, s.N}, types.ssm);
    add(layer, "k", {rows, s.R, s.H, s.N});
    add(layer, "v", {rows, s.H, s.P});
  };
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    if (const ConvLayer conv = conv_of(config, layer); conv.width > 0) {
      add(layer, "conv", {rows, conv.width - 1, conv.channels});
    }
    const AttentionConfig& a = config.attention;
    const DeltaShape& d = config.delta;
    switch (config.kind(layer)) {
      case LayerKind::mamba3:
        add_mixer(layer, config.mixer);
        break;
      case LayerKind::mamba2:
        add_mixer(layer, config.mamba2);
        break;
      case LayerKind::gated_deltanet:
        add(layer, "delta", {rows, d.H, d.V, d.K});
        break;
      case LayerKind::attention:
        add(layer, "cache_k", {rows, T_max, a.Hkv, a.d}, types.cache);
        add(layer, "cache_v", {rows, T_max, a.Hkv, a.d}, types.cache);
        break;
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

StateBatch StateBatch::slice(int64_t begin, int64_t end) const {
  StateBatch part;
  part.rows.assign(rows.begin() + begin, rows.begin() + end);
  for (const std::string& name : indices.names()) {
    part.indices.add(name, indices.at(name).slice(0, begin, end));
  }
  for (BlockState state : blocks) {
    set_rows(state, part.indices.at("rows"), part.indices.at("lengths"));
    part.blocks.push_back(state);
  }
  return part;
}

StatePool::StatePool(Context& ctx, const Config& config, int64_t rows, int64_t T_max,
                     const StateTypes& types)
    : ctx_(&ctx),
      config_(config),
      types_(types),
      T_max_(has_attention(config) ? std::max<int64_t>(T_max, 1) : 0),
      lengths_(static_cast<size_t>(rows), 0),
      tensors_(allocate(state_table(config, rows, T_max_, types), ctx.device)) {}

void StatePool::set_length(int64_t row, int64_t tokens) {
  lengths_.at(static_cast<size_t>(row)) = tokens;
}

bool StatePool::reserve(int64_t tokens) {
  if (!has_attention(config_) || tokens <= T_max_) return false;
  const int64_t T_max = std::max(tokens, 2 * T_max_);
  // The mixers' tensors are small beside the caches: one allocation holds all, as at the start.
  const NamedTensors grown = allocate(state_table(config_, rows(), T_max, types_), ctx_->device);
  for (const std::string& name : tensors_.names()) {
    copy_rows(*ctx_, tensors_.at(name), grown.at(name));
  }
  synchronize(*ctx_);  // before the old ones go
  tensors_ = grown;
  T_max_ = T_max;
  return true;
}

void StatePool::reset(int64_t row) {
  for (const std::string& name : tensors_.names()) {
    zero(*ctx_, tensors_.at(name).select(0, row));
  }
  set_length(row, 0);
}

void StatePool::reset() {
  for (const std::string& name : tensors_.names()) zero(*ctx_, tensors_.at(name));
  std::fill(lengths_.begin(), lengths_.end(), 0);
}

void StatePool::copy(int64_t from, int64_t to) {
  if (from == to) return;
  for (const std::string& name : tensors_.names()) {
    mamba3::copy(*ctx_, tensors_.at(name).select(0, from), tensors_.at(name).select(0, to));
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
  }
  const int64_t B = static_cast<int64_t>(batch.rows.size());
  batch.indices = allocate({{.name = "rows", .dims = {B}, .dtype = DType::i32},
                            {.name = "lengths", .dims = {B}, .dtype = DType::i32},
                            {.name = "positions", .dims = {B}, .dtype = DType::i64}},
                           ctx_->device);
  const View row_view = batch.indices.at("rows"), length_view = batch.indices.at("lengths");
  mamba3::copy(*ctx_, view_of(batch.rows.data(), {B}), row_view);
  place_lengths(batch);
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
    BlockState state = resolve_block_state(tensors_, layer);
    set_rows(state, row_view, length_view);
    batch.blocks.push_back(state);
  }
  return batch;
}

void StatePool::place_lengths(const StateBatch& batch) const {
  std::vector<int32_t> lengths;
  std::vector<int64_t> positions;
  for (const int32_t row : batch.rows) {
    lengths.push_back(static_cast<int32_t>(length(row)));
    positions.push_back(length(row));
  }
  const int64_t B = std::ssize(batch.rows);
  mamba3::copy(*ctx_, view_of(lengths.data(), {B}), batch.indices.at("lengths"));
  mamba3::copy(*ctx_, view_of(positions.data(), {B}), batch.indices.at("positions"));
}

void StatePool::advance(const StateBatch& batch, std::span<const int64_t> tokens) {
  for (size_t b = 0; b < batch.rows.size(); ++b) {
    set_length(batch.rows[b], length(batch.rows[b]) + tokens[b]);
  }
  place_lengths(batch);
}

void StatePool::advance(const StateBatch& batch, int64_t tokens) {
  advance_here(batch, tokens);
  advance_on_device(batch, tokens);
}

void StatePool::advance_here(const StateBatch& batch, int64_t tokens) {
  for (const int32_t row : batch.rows) set_length(row, length(row) + tokens);
}

void StatePool::advance_on_device(const StateBatch& batch, int64_t tokens) {
  increment(*ctx_, {.counters = batch.indices.at("lengths"), .by = tokens});
  increment(*ctx_, {.counters = batch.indices.at("positions"), .by = tokens});
}

}  // namespace mamba3
