#include "core/view.h"

#include <fmt/ranges.h>

#include "core/error.h"

namespace mamba3 {

int64_t View::size() const {
  int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= dim(i);
  return n;
}

bool View::contiguous() const {
  int64_t expected = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (dim(i) != 1 && stride(i) != expected) return false;
    expected *= dim(i);
  }
  return true;
}

std::string View::shape() const {
  return fmt::format("({})", fmt::join(dims.begin(), dims.begin() + rank, ", "));
}

View View::slice(int axis, int64_t from, int64_t to) const {
  assert(axis < rank && 0 <= from && from <= to && to <= dim(axis));
  View view = *this;
  view.data = static_cast<char*>(data) + from * stride(axis) * size_of(dtype);
  view.dims[static_cast<size_t>(axis)] = to - from;
  return view;
}

View View::select(int axis, int64_t index) const {
  View view = slice(axis, index, index + 1);
  for (size_t i = static_cast<size_t>(axis); i + 1 < static_cast<size_t>(rank); ++i) {
    view.dims[i] = view.dims[i + 1];
    view.strides[i] = view.strides[i + 1];
  }
  --view.rank;
  return view;
}

View View::reshape(std::initializer_list<int64_t> new_dims) const {
  View view = make_view(data, dtype, new_dims, device);
  if (!contiguous() || view.size() != size()) {
    error("[reshape] cannot view {}{} as {}", contiguous() ? "" : "the strided ", shape(),
          view.shape());
  }
  return view;
}

View make_view(void* data, DType dtype, std::span<const int64_t> dims, Device device) {
  if (dims.size() > kMaxRank) error("[view] rank {} is above {}", dims.size(), kMaxRank);
  View view{.data = data, .dtype = dtype, .device = device, .rank = static_cast<int>(dims.size())};
  int64_t stride = 1;
  for (size_t i = dims.size(); i-- > 0;) {
    view.dims[i] = dims[i];
    view.strides[i] = stride;
    stride *= dims[i];
  }
  return view;
}

View make_view(void* data, DType dtype, std::initializer_list<int64_t> dims, Device device) {
  return make_view(data, dtype, std::span(dims.begin(), dims.size()), device);
}

}  // namespace mamba3
