#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace mamba3::ref {

// One sequence, x (T, columns) with heads of d side by side, whose first token is at `position`.
template <typename T>
std::vector<T> rotary(std::vector<T> x, size_t columns, size_t d, size_t dims, double base,
                      int64_t position = 0, bool inverse = false) {
  const size_t half = dims / 2;
  for (size_t head = 0; head < x.size(); head += d) {
    const double at = static_cast<double>(position) + static_cast<double>(head / columns);
    for (size_t i = 0; i < half; ++i) {
      const double share = static_cast<double>(i) / static_cast<double>(half);
      const double angle = at * std::pow(base, -share) * (inverse ? -1 : 1);
      const T a = x[head + i], b = x[head + half + i];
      x[head + i] = a * T(std::cos(angle)) - b * T(std::sin(angle));
      x[head + half + i] = a * T(std::sin(angle)) + b * T(std::cos(angle));
    }
  }
  return x;
}

}  // namespace mamba3::ref
