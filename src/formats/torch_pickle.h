#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"

namespace mamba3 {

// A tensor as the pickle of a torch state dict describes it: a strided part of a storage, which
// lies elsewhere under a key. Tensors with the same key share memory.
struct TorchTensor {
  std::string name;
  std::string storage;
  DType dtype = DType::f32;
  int64_t storage_size = 0;      // elements
  int64_t offset = 0;            // elements
  std::vector<int64_t> dims;     // at most kMaxRank
  std::vector<int64_t> strides;  // elements; all of the tensor lies within the storage
};

// Reads the pickle (protocol 2 to 5) of a dict from names to tensors, in its order. Nothing is
// executed: of the pickle machine's opcodes and of the names that it may call, only those that
// torch.save(model.state_dict()) writes are known; any other throws InputError that names it, as do
// damaged data. `source` begins every message.
std::vector<TorchTensor> unpickle_state_dict(std::span<const std::byte> pickle,
                                             std::string_view source);

}  // namespace mamba3
