#pragma once

#include <cmath>
#include <complex>

namespace mamba3::ref {

// The references are templates on the number type: float and double for values,
// std::complex<double> for derivatives by the complex step, f'(x) = Im f(x + i h) / h with h =
// 1e-30, exact to rounding. Decisions (clamps, maxima, comparisons) look at the real part only.
inline constexpr double kComplexStep = 1e-30;

template <typename T>
auto real_part(const T& x) {
  return std::real(x);
}

template <typename T>
T softplus(const T& x) {
  using std::exp, std::log;
  return real_part(x) > 20 ? x + exp(-x) : log(T(1) + exp(x));
}

template <typename T>
T sigmoid(const T& x) {
  using std::exp;
  if (real_part(x) >= 0) return T(1) / (T(1) + exp(-x));
  const T e = exp(x);
  return e / (T(1) + e);
}

template <typename T>
T silu(const T& x) {
  return x * sigmoid(x);
}

}  // namespace mamba3::ref
