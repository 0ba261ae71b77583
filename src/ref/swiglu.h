#pragma once

#include <vector>

#include "ref/number.h"

namespace mamba3::ref {

// y_gate (M,2F) -> y silu(gate) (M,F).
template <typename T>
std::vector<T> swiglu(const std::vector<T>& y_gate, size_t F) {
  std::vector<T> out;
  for (size_t row = 0; row < y_gate.size(); row += 2 * F) {
    for (size_t i = 0; i < F; ++i) out.push_back(y_gate[row + i] * silu(y_gate[row + F + i]));
  }
  return out;
}

}  // namespace mamba3::ref
