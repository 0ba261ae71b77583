#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "formats/torch_pickle.h"

namespace mamba3::testing {

// Zip archives and torch files as their writers make them, for tests that then damage them.

struct ZipPart {
  std::string name;
  std::string content;
  bool deflate = false;
};

// With `zip64` all sizes and offsets are in the 64-bit fields.
std::string zip_of(const std::vector<ZipPart>& parts, bool zip64 = false);

// A pickle by opcodes, as torch.save writes them.
class Pickle {
 public:
  Pickle() { *this << "\x80\x02"; }
  Pickle& operator<<(std::string_view opcodes) {
    text_ += opcodes;
    return *this;
  }
  Pickle& global(std::string_view module, std::string_view name);
  Pickle& string(std::string_view text);
  Pickle& integer(int64_t value);
  Pickle& tuple(const std::vector<int64_t>& values);
  // The call of _rebuild_tensor_v2 without the REDUCE that executes it.
  Pickle& tensor_call(const TorchTensor& tensor);
  std::string end() const { return text_ + "."; }

 private:
  std::string text_;
};

std::string pickle_of(const std::vector<TorchTensor>& tensors);

struct TorchStorage {
  std::string key;
  std::string content;
};
// A whole pytorch_model.bin.
std::string torch_file_of(const std::vector<TorchTensor>& tensors,
                          const std::vector<TorchStorage>& storages, bool deflate = false);

}  // namespace mamba3::testing
