#include "core/check.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace mamba3 {

namespace {

std::string names_of(std::initializer_list<DType> dtypes) {
  std::string names;
  for (const DType dtype : dtypes) {
    if (!names.empty()) names += " or ";
    names += name_of(dtype);
  }
  return names;
}

// One past the last byte that the view covers.
const char* end_of(const View& view) {
  int64_t last = 0;
  for (int i = 0; i < view.rank; ++i)
    last += std::max<int64_t>(view.dim(i) - 1, 0) * view.stride(i);
  return static_cast<const char*>(view.data) + (last + 1) * size_of(view.dtype);
}

}  // namespace

void Check::tensor(std::string_view name, const View& view, std::initializer_list<int64_t> dims,
                   std::initializer_list<DType> dtypes) const {
  if (view.empty()) input_error("[{}] {} is missing", op_, name);
  if (view.device != device_) {
    input_error("[{}] {} is on the {}, want the {}", op_, name,
                view.device == Device::cpu ? "CPU" : "GPU", device_ == Device::cpu ? "CPU" : "GPU");
  }
  if (std::find(dtypes.begin(), dtypes.end(), view.dtype) == dtypes.end()) {
    input_error("[{}] dtype of {}: got {}, want {}", op_, name, name_of(view.dtype),
                names_of(dtypes));
  }
  if (view.rank != static_cast<int>(dims.size())) {
    input_error("[{}] rank of {}: got {}, want {}", op_, name, view.rank, dims.size());
  }
  int axis = 0;
  for (const int64_t want : dims) {
    if (view.dim(axis) != want) {
      input_error("[{}] dim {} of {}: got {}, want {}", op_, axis, name, view.dim(axis), want);
    }
    ++axis;
  }
  if (view.rank > 0 && view.dim(view.rank - 1) > 1 && view.stride(view.rank - 1) != 1) {
    input_error("[{}] innermost stride of {}: got {}, want 1", op_, name,
                view.stride(view.rank - 1));
  }
}

void Check::dense(std::string_view name, const View& view, std::initializer_list<int64_t> dims,
                  std::initializer_list<DType> dtypes) const {
  tensor(name, view, dims, dtypes);
  if (!view.contiguous()) input_error("[{}] {} must be contiguous", op_, name);
}

std::initializer_list<DType> Check::activation_types() const {
  static constexpr std::initializer_list<DType> kCpu = {DType::f32};
  static constexpr std::initializer_list<DType> kGpu = {DType::f32, DType::bf16};
  return device_ == Device::cpu ? kCpu : kGpu;
}

void Check::disjoint(std::string_view name_a, const View& a, std::string_view name_b,
                     const View& b) const {
  if (a.empty() || b.empty() || a.size() == 0 || b.size() == 0) return;
  const char* a_begin = static_cast<const char*>(a.data);
  const char* b_begin = static_cast<const char*>(b.data);
  if (a_begin < end_of(b) && b_begin < end_of(a)) {
    input_error("[{}] {} and {} must not share memory", op_, name_a, name_b);
  }
}

void Check::same_or_disjoint(std::string_view name_a, const View& a, std::string_view name_b,
                             const View& b) const {
  const bool same = a.data == b.data && a.dtype == b.dtype && a.rank == b.rank &&
                    a.dims == b.dims && a.strides == b.strides;
  if (!same) disjoint(name_a, a, name_b, b);
}

void Check::that(bool holds, std::string_view message) const {
  if (!holds) input_error("[{}] {}", op_, message);
}

void Check::range(std::string_view name, const View& view, int64_t low, int64_t high) const {
  if (device_ != Device::cpu) return;  // reading it here would wait for the device
  const int32_t* values = view.as<int32_t>();
  for (int64_t i = 0; i < view.size(); ++i) {
    if (values[i] < low || values[i] >= high) {
      input_error("[{}] {}[{}] is {}, want {} <= value < {}", op_, name, i, values[i], low, high);
    }
  }
}

}  // namespace mamba3
