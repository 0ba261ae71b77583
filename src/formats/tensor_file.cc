#include "formats/tensor_file.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace mamba3 {

namespace {

// Copies the elements of `view` to `out`, row-major, and returns the end of what it wrote.
std::byte* copy_elements(const View& view, std::byte* out) {
  const auto bytes = static_cast<size_t>(view.bytes());
  if (view.contiguous()) {
    if (bytes > 0) std::memcpy(out, view.data, bytes);
    return out + bytes;
  }
  for (int64_t i = 0; i < view.dim(0); ++i) out = copy_elements(view.select(0, i), out);
  return out;
}

}  // namespace

const View& TensorFile::at(std::string_view name) const {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const StoredTensor& t) { return t.name == name; });
  if (found == tensors.end()) input_error("there is no tensor {:?} in the file", name);
  return found->view;
}

std::optional<int64_t> dense_bytes(std::span<const int64_t> dims, DType dtype) {
  if (dims.size() > kMaxRank) return std::nullopt;
  int64_t bytes = size_of(dtype);
  for (const int64_t dim : dims) {
    if (dim < 0 || __builtin_mul_overflow(bytes, dim, &bytes)) return std::nullopt;
  }
  return bytes;
}

bool is_dense(const View& view) {
  const auto element = static_cast<size_t>(size_of(view.dtype));
  return view.contiguous() && reinterpret_cast<uintptr_t>(view.data) % element == 0;
}

StoredTensor make_dense(StoredTensor tensor) {
  const View& view = tensor.view;
  if (is_dense(view)) return tensor;
  const auto memory = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(view.bytes()));
  copy_elements(view, memory->data());
  View copy = make_view(memory->data(), view.dtype,
                        std::span(view.dims.data(), static_cast<size_t>(view.rank)));
  return {std::move(tensor.name), copy, memory};
}

}  // namespace mamba3
