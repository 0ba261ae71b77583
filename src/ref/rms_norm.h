#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace mamba3::ref {

// rmsnorm of x (n), times weight.
template <typename T>
std::vector<T> normed(const T* x, const T* weight, int64_t n, double eps) {
  using std::sqrt;
  T sum(0);
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const T rstd = T(1) / sqrt(sum / T(static_cast<double>(n)) + T(eps));
  std::vector<T> out(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) out[static_cast<size_t>(i)] = x[i] * rstd * weight[i];
  return out;
}

// residual (M,D) + delta (M,D, or empty) -> its rmsnorm (M,D).
template <typename T>
std::vector<T> rms_norm(const std::vector<T>& residual, const std::vector<T>& delta,
                        const std::vector<T>& weight, double eps) {
  const size_t D = weight.size();
  std::vector<T> sum = residual, out;
  for (size_t i = 0; i < delta.size(); ++i) sum[i] += delta[i];
  for (size_t row = 0; row < sum.size(); row += D) {
    const std::vector<T> n = normed(sum.data() + row, weight.data(), static_cast<int64_t>(D), eps);
    out.insert(out.end(), n.begin(), n.end());
  }
  return out;
}

}  // namespace mamba3::ref
