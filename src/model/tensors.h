#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/context.h"
#include "core/view.h"
#include "model/config.h"

namespace mamba3 {

// The table of named tensors: one list says what exists, and the arena, checkpoints, the optimiser
// and the tests are driven by it. Nothing is known by position.
enum class Lifetime : uint8_t {
  parameter,   // weights; their gradients and moments have the same names and dims
  state,       // carried from call to call, a pool of rows
  activation,  // kept from the forward to the backward
  scratch,     // lives within one block
};

// Initial values; init.h says what each means. `normal` is for the embedding, `fan_in` for the
// other matrices.
enum class Init : uint8_t {
  zeros,
  ones,
  normal,
  fan_in,
  inverse_rank,
  dt_bias,
  A_log,
  residual_out
};

struct TensorSpec {
  std::string name;  // as in the official checkpoint, or "layers.3.proj"
  std::vector<int64_t> dims;
  DType dtype = DType::f32;
  Lifetime lifetime = Lifetime::parameter;
  bool decay = false;  // weight decay applies
  Init init = Init::zeros;
};

// Every parameter of the model, in checkpoint order. A tied lm_head is not in it.
std::vector<TensorSpec> parameter_table(const Config& config);
int64_t parameter_count(const Config& config);

// Views by name, in insertion order, with whatever owns their memory (a mapped file, an arena).
class NamedTensors {
 public:
  void add(std::string name, const View& view, std::shared_ptr<const void> owner = nullptr);
  bool contains(std::string_view name) const;
  const View& at(std::string_view name) const;  // throws InputError naming the tensor
  View find(std::string_view name) const;       // empty view if absent
  const std::vector<std::string>& names() const { return names_; }

 private:
  std::vector<std::string> names_;
  std::map<std::string, View, std::less<>> views_;
  std::vector<std::shared_ptr<const void>> owners_;
};

// One zeroed, 256-byte aligned allocation that holds every tensor of the table.
NamedTensors allocate(const std::vector<TensorSpec>& table, Device device = Device::cpu);

// Where a model runs, and the type of its matrices and activations there. Everything else is f32.
// On the CPU activations are f32 and matrices of any type, as they are stored.
struct Placement {
  Device device = Device::cpu;
  DType dtype = DType::f32;
};

// device: "cpu", "cuda" or "auto", the GPU if there is one; dtype: "f32", "bf16" or "auto", bf16 on
// the GPU and f32 on the CPU. Throws InputError for anything else.
Placement parse_placement(std::string_view device, std::string_view dtype);
std::string_view name_of(Device device);  // "cpu", "cuda"

// The tensors in memory of the context's device, of the same types.
NamedTensors copy_to_device(Context& ctx, const NamedTensors& tensors);
NamedTensors copy_to_host(Context& ctx, const NamedTensors& tensors);

}  // namespace mamba3
