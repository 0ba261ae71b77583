#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/view.h"

namespace mamba3 {

// What the readers of tensor files have in common.

// A tensor of a file. Its view is dense, aligned to its element and, being of a mapped file where
// possible, must not be written to.
struct StoredTensor {
  std::string name;
  View view;
  std::shared_ptr<const void> owner;  // keeps the view's memory
};

struct TensorFile {
  std::vector<StoredTensor> tensors;  // in the order of the file
  std::map<std::string, std::string> metadata;

  const View& at(std::string_view name) const;  // throws InputError naming the tensor
};

// The bytes of a dense tensor, or nothing if a dim is negative, there are more than kMaxRank of
// them or the size overflows.
std::optional<int64_t> dense_bytes(std::span<const int64_t> dims, DType dtype);

// Row-major without gaps, and aligned to its element.
bool is_dense(const View& view);

// The tensor itself if it is dense, else a copy that is.
StoredTensor make_dense(StoredTensor tensor);

}  // namespace mamba3
