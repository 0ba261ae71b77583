#pragma once

#include <array>
#include <cassert>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "core/dtype.h"

namespace mamba3 {

enum class Device : uint8_t { cpu, cuda };

inline constexpr int kMaxRank = 6;

// A tensor that somebody else owns: pointer, dtype, device, dims and strides (in elements, any
// order). A default View is empty, which ops read as "absent". Views are passed by value.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int rank = 0;
  std::array<int64_t, kMaxRank> dims{};
  std::array<int64_t, kMaxRank> strides{};

  bool empty() const { return data == nullptr; }
  int64_t dim(int i) const { return dims[static_cast<size_t>(i)]; }
  int64_t stride(int i) const { return strides[static_cast<size_t>(i)]; }
  int64_t size() const;  // number of elements
  int64_t bytes() const { return size() * size_of(dtype); }
  bool contiguous() const;    // row-major without gaps
  std::string shape() const;  // "(2, 75, 64)"

  // The first element as T, which must be the view's dtype.
  template <typename T>
  T* as() const {
    assert(dtype == DTypeOf<T>::value);
    return static_cast<T*>(data);
  }

  View slice(int axis, int64_t from, int64_t to) const;  // dims[axis] becomes to - from
  View select(int axis, int64_t index) const;            // removes `axis`
  // Same elements in another shape; the view must be contiguous and the sizes equal.
  View reshape(std::initializer_list<int64_t> new_dims) const;
};

// A contiguous view of memory at `data`.
View make_view(void* data, DType dtype, std::span<const int64_t> dims, Device device = Device::cpu);
View make_view(void* data, DType dtype, std::initializer_list<int64_t> dims,
               Device device = Device::cpu);

// A contiguous CPU view of `data`, the dtype taken from T. Constness is not tracked by views:
// whether an op writes to a view is part of the op's contract.
template <typename T>
View view_of(T* data, std::initializer_list<int64_t> dims) {
  using Element = std::remove_const_t<T>;
  return make_view(const_cast<Element*>(data), DTypeOf<Element>::value, dims);
}

}  // namespace mamba3
