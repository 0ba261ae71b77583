#pragma once

#include <bit>
#include <cassert>
#include <cstddef>
#include <cstring>
#include <span>

namespace mamba3 {

// The T at `offset`, aligned or not, which the caller has checked to lie within bytes. All files
// that we read are little-endian, as is every machine that we run on.
template <typename T>
T load_le(std::span<const std::byte> bytes, size_t offset) {
  static_assert(std::endian::native == std::endian::little);
  assert(offset + sizeof(T) <= bytes.size());
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof(T));
  return value;
}

}  // namespace mamba3
