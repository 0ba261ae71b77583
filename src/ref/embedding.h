#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mamba3::ref {

// The rows of weight (V,D) that ids (M) name -> (M,D).
template <typename T>
std::vector<T> embedding(std::span<const int32_t> ids, const std::vector<T>& weight, size_t D) {
  std::vector<T> out;
  for (const int32_t id : ids) {
    const auto row = weight.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(id) * D);
    out.insert(out.end(), row, row + static_cast<std::ptrdiff_t>(D));
  }
  return out;
}

}  // namespace mamba3::ref
