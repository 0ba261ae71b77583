#pragma once

#include "ref/rms_norm.h"

namespace mamba3::ref {

// x (M,C) -> the rmsnorm of each of the `groups` groups of channels of a row, times weight (C).
template <typename T>
std::vector<T> grouped_rms_norm(const std::vector<T>& x, const std::vector<T>& weight,
                                size_t groups, double eps) {
  const size_t C = weight.size(), width = C / groups;
  std::vector<T> out;
  for (size_t i = 0; i < x.size(); i += width) {
    const auto n = normed(x.data() + i, weight.data() + i % C, static_cast<int64_t>(width), eps);
    out.insert(out.end(), n.begin(), n.end());
  }
  return out;
}

}  // namespace mamba3::ref
