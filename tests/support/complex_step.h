#pragma once

#include <algorithm>
#include <complex>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "ref/number.h"
#include "support/device.h"
#include "support/random.h"
#include "support/tensor.h"

namespace mamba3::testing {

using Complex = std::complex<double>;

inline std::vector<Complex> to_complex(std::span<const double> values) {
  return {values.begin(), values.end()};
}

// The derivatives of a scalar function by the complex step: df/dx_i = Im f(x + i h e_i) / h at the
// positions given. f takes a std::vector<Complex> and returns a Complex.
template <typename F>
std::vector<double> complex_step(F&& f, std::span<const double> x,
                                 std::span<const int64_t> positions) {
  std::vector<Complex> point = to_complex(x);
  std::vector<double> gradient;
  for (const int64_t position : positions) {
    Complex& entry = point[static_cast<size_t>(position)];
    entry.imag(ref::kComplexStep);
    gradient.push_back(std::imag(f(std::as_const(point))) / ref::kComplexStep);
    entry.imag(0);
  }
  return gradient;
}

// At every position.
template <typename F>
std::vector<double> complex_step(F&& f, std::span<const double> x) {
  std::vector<int64_t> positions;
  for (size_t i = 0; i < x.size(); ++i) positions.push_back(static_cast<int64_t>(i));
  return complex_step(f, x, positions);
}

// `count` positions out of n in rising order (some may repeat), the first and the last among them:
// for gradients too large to check everywhere.
inline std::vector<int64_t> some_positions(Random& random, int64_t n, int64_t count) {
  std::vector<int64_t> positions = {0, n - 1};
  while (static_cast<int64_t>(positions.size()) < count) positions.push_back(random.integer(0, n));
  std::sort(positions.begin(), positions.end());
  return positions;
}

// The elements of a view at row-major positions, to compare with a sampled gradient.
inline Tensor gather(const View& any, std::span<const int64_t> positions) {
  const HostCopy copied = host_copy(any);
  const View& view = copied.view;
  Tensor out({static_cast<int64_t>(positions.size())}, view.dtype);
  for (size_t i = 0; i < positions.size(); ++i) {
    out.set(static_cast<int64_t>(i), value_of(view, positions[i]));
  }
  return out;
}

// sum_i weight_i y_i: makes a scalar of an op's output; its gradient w.r.t. y is `weight`.
template <typename T>
T dot(std::span<const double> weight, const std::vector<T>& y) {
  T sum(0);
  for (size_t i = 0; i < weight.size(); ++i) sum += T(weight[i]) * y[i];
  return sum;
}

}  // namespace mamba3::testing
