#include "model/tensors.h"

#include <utility>

#include "core/error.h"
#include "core/memory.h"

namespace mamba3 {

namespace {

constexpr int64_t kAlignment = 256;  // what memory is aligned to on every device

int64_t size_of_dims(const std::vector<int64_t>& dims) {
  int64_t n = 1;
  for (const int64_t dim : dims) n *= dim;
  return n;
}

int64_t aligned_bytes(const TensorSpec& spec) {
  const int64_t bytes = size_of_dims(spec.dims) * size_of(spec.dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Collects the parameters, which differ in these columns only. Weight decay applies to matrices and
// to the MIMO projections; dt_bias, D, norms and biases, B_bias and C_bias among them, have none.
class ParameterTable {
 public:
  void matrix(std::string name, int64_t rows, int64_t columns, Init init) {
    add(std::move(name), {rows, columns}, init, true);
  }
  void projection(std::string name, std::vector<int64_t> dims, Init init) {
    add(std::move(name), std::move(dims), init, true);
  }
  void undecayed(std::string name, std::vector<int64_t> dims, Init init) {
    add(std::move(name), std::move(dims), init, false);
  }
  std::vector<TensorSpec> take() { return std::move(specs_); }

 private:
  void add(std::string name, std::vector<int64_t> dims, Init init, bool decay) {
    specs_.push_back({.name = std::move(name),
                      .dims = std::move(dims),
                      .lifetime = Lifetime::parameter,
                      .decay = decay,
                      .init = init});
  }

  std::vector<TensorSpec> specs_;
};

// As PyTorch's Conv1d stores it.
void add_conv(ParameterTable& table, const std::string& prefix, const ConvLayer& conv) {
  if (conv.width == 0) return;
  table.undecayed(prefix + "conv1d.weight", {conv.channels, 1, conv.width}, Init::fan_in);
  if (conv.bias) table.undecayed(prefix + "conv1d.bias", {conv.channels}, Init::zeros);
}

void add_mixer(ParameterTable& table, const std::string& prefix, const MixerShape& m, int64_t D) {
  table.matrix(prefix + "in_proj.weight", m.d_proj(), D, Init::fan_in);
  table.undecayed(prefix + "dt_bias", {m.H}, Init::dt_bias);
  if (!m.has_dd_A()) table.undecayed(prefix + "A_log", {m.H}, Init::A_log);
  if (m.bc_bias) {
    table.undecayed(prefix + "B_bias", {m.H, m.R, m.N}, Init::ones);
    table.undecayed(prefix + "C_bias", {m.H, m.R, m.N}, Init::ones);
  }
  if (m.bc_norm) {
    table.undecayed(prefix + "B_norm.weight", {m.N}, Init::ones);
    table.undecayed(prefix + "C_norm.weight", {m.N}, Init::ones);
  }
  if (m.mimo) {
    table.projection(prefix + "mimo_x", {m.H, m.R, m.P}, Init::inverse_rank);
    table.projection(prefix + "mimo_z", {m.H, m.R, m.P}, Init::ones);
    table.projection(prefix + "mimo_o", {m.H, m.R, m.P}, Init::inverse_rank);
  }
  table.undecayed(prefix + "D", {m.H}, Init::ones);
  if (m.out_norm) table.undecayed(prefix + "norm.weight", {m.d_inner()}, Init::ones);
  table.matrix(prefix + "out_proj.weight", D, m.d_inner(), Init::residual_out);
}

void add_mamba2(ParameterTable& table, const std::string& prefix, const Config& config) {
  add_mixer(table, prefix, config.mamba2, config.D);
  table.undecayed(prefix + "norm.weight", {config.mamba2.d_inner()}, Init::ones);
}

void add_delta(ParameterTable& table, const std::string& prefix, const Config& config) {
  const DeltaShape& d = config.delta;
  table.matrix(prefix + "in_proj.weight", d.d_proj(), config.D, Init::fan_in);
  table.undecayed(prefix + "A_log", {d.H}, Init::A_log);
  table.undecayed(prefix + "dt_bias", {d.H}, Init::dt_bias);
  table.undecayed(prefix + "norm.weight", {d.V}, Init::ones);
  table.matrix(prefix + "out_proj.weight", config.D, d.d_inner(), Init::residual_out);
}

void add_attention(ParameterTable& table, const std::string& prefix, const AttentionConfig& a,
                   int64_t D) {
  const int64_t d_proj = (a.Hq + 2 * a.Hkv) * a.d;
  table.matrix(prefix + "in_proj.weight", d_proj, D, Init::fan_in);
  if (a.qkv_bias) table.undecayed(prefix + "in_proj.bias", {d_proj}, Init::zeros);
  table.matrix(prefix + "out_proj.weight", D, a.Hq * a.d, Init::residual_out);
  if (a.out_bias) table.undecayed(prefix + "out_proj.bias", {D}, Init::zeros);
}

void add_layer(ParameterTable& table, const Config& config, int64_t layer) {
  const std::string prefix = fmt::format("backbone.layers.{}.", layer);
  table.undecayed(prefix + "norm.weight", {config.D}, Init::ones);
  add_conv(table, prefix + "mixer.", conv_of(config, layer));
  switch (config.kind(layer)) {
    case LayerKind::mamba3:
      add_mixer(table, prefix + "mixer.", config.mixer, config.D);
      break;
    case LayerKind::mamba2:
      add_mamba2(table, prefix + "mixer.", config);
      break;
    case LayerKind::gated_deltanet:
      add_delta(table, prefix + "mixer.", config);
      break;
    case LayerKind::attention:
      add_attention(table, prefix + "mixer.", config.attention, config.D);
      break;
  }
  if (config.d_mlp == 0) return;
  table.undecayed(prefix + "norm2.weight", {config.D}, Init::ones);
  table.matrix(prefix + "mlp.fc1.weight", 2 * config.d_mlp, config.D, Init::fan_in);
  table.matrix(prefix + "mlp.fc2.weight", config.D, config.d_mlp, Init::residual_out);
}

}  // namespace

std::vector<TensorSpec> parameter_table(const Config& config) {
  ParameterTable table;
  table.matrix("backbone.embedding.weight", config.vocab_padded, config.D, Init::normal);
  for (int64_t layer = 0; layer < config.n_layer; ++layer) add_layer(table, config, layer);
  table.undecayed("backbone.norm_f.weight", {config.D}, Init::ones);
  if (!config.tied) table.matrix("lm_head.weight", config.vocab_padded, config.D, Init::fan_in);
  return table.take();
}

int64_t parameter_count(const Config& config) {
  int64_t count = 0;
  for (const TensorSpec& spec : parameter_table(config)) count += size_of_dims(spec.dims);
  return count;
}

void NamedTensors::add(std::string name, const View& view, std::shared_ptr<const void> owner) {
  if (!views_.emplace(name, view).second) error("there is a tensor {:?} already", name);
  names_.push_back(std::move(name));
  if (owner != nullptr && (owners_.empty() || owners_.back() != owner)) {
    owners_.push_back(std::move(owner));
  }
}

bool NamedTensors::contains(std::string_view name) const {
  return views_.find(name) != views_.end();
}

const View& NamedTensors::at(std::string_view name) const {
  const auto found = views_.find(name);
  if (found == views_.end()) input_error("there is no tensor {:?}", name);
  return found->second;
}

View NamedTensors::find(std::string_view name) const {
  const auto found = views_.find(name);
  return found == views_.end() ? View{} : found->second;
}

NamedTensors allocate(const std::vector<TensorSpec>& table, Device device) {
  int64_t bytes = 0;
  for (const TensorSpec& spec : table) bytes += aligned_bytes(spec);
  const std::shared_ptr<void> owner = allocate_zeros(device, static_cast<size_t>(bytes));

  NamedTensors tensors;
  char* next = static_cast<char*>(owner.get());
  for (const TensorSpec& spec : table) {
    tensors.add(spec.name, make_view(next, spec.dtype, spec.dims, device), owner);
    next += aligned_bytes(spec);
  }
  return tensors;
}

Placement parse_placement(std::string_view device, std::string_view dtype) {
  if (device != "cpu" && device != "cuda" && device != "auto") {
    input_error("unknown device '{}': use cpu, cuda or auto", device);
  }
  if (dtype != "f32" && dtype != "bf16" && dtype != "auto") {
    input_error("unknown type '{}': use f32, bf16 or auto", dtype);
  }
  const bool gpu = device == "cuda" || (device == "auto" && cuda::available());
  if (!gpu) {
    if (dtype == "bf16") input_error("on the CPU the arithmetic is f32: leave --dtype bf16 out");
    return {};
  }
  return {Device::cuda, dtype == "f32" ? DType::f32 : DType::bf16};
}

std::string_view name_of(Device device) {
  return device == Device::cpu ? "cpu" : "cuda";
}

namespace {

NamedTensors copy_all(Context& ctx, const NamedTensors& tensors, Device device) {
  std::vector<TensorSpec> table;
  for (const std::string& name : tensors.names()) {
    const View& view = tensors.at(name);
    table.push_back({.name = name,
                     .dims = {view.dims.begin(), view.dims.begin() + view.rank},
                     .dtype = view.dtype});
  }
  NamedTensors out = allocate(table, device);
  for (const std::string& name : tensors.names()) copy(ctx, tensors.at(name), out.at(name));
  return out;
}

}  // namespace

NamedTensors copy_to_device(Context& ctx, const NamedTensors& tensors) {
  return copy_all(ctx, tensors, ctx.device);
}

NamedTensors copy_to_host(Context& ctx, const NamedTensors& tensors) {
  return copy_all(ctx, tensors, Device::cpu);
}

}  // namespace mamba3
