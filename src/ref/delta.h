#pragma once

#include <vector>

#include "ops/delta.h"
#include "ref/number.h"
#include "ref/rms_norm.h"

namespace mamba3::ref {

// The mixer of ops/delta.h one token at a time.
template <typename T>
struct DeltaParams {
  std::vector<T> A_log, dt_bias, norm;  // (H) (H) (V)
};

// x (n) over its length.
template <typename T>
std::vector<T> unit_vector(const T* x, int64_t n) {
  using std::sqrt;
  T sum(static_cast<double>(kDeltaNormEps));
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const T length = sqrt(sum);
  std::vector<T> unit(x, x + n);
  for (T& value : unit) value /= length;
  return unit;
}

// One token: proj (d_proj) -> y (H V), the state (H, V, K) updated in place.
template <typename T>
void delta_step(const DeltaShape& s, const DeltaParams<T>& p, const T* proj, std::vector<T>& state,
                T* y) {
  using std::exp;
  const int64_t K = s.K, V = s.V;
  for (int64_t h = 0; h < s.H; ++h) {
    const size_t head = static_cast<size_t>(h);
    const std::vector<T> q = unit_vector(proj + s.q() + h * K, K);
    const std::vector<T> k = unit_vector(proj + s.k() + h * K, K);
    const T rate = softplus(proj[s.a() + h] + p.dt_bias[head]);
    const T alpha = exp(-exp(p.A_log[head]) * rate);
    const T beta = T(s.negative ? 2 : 1) * sigmoid(proj[s.b() + h]);
    std::vector<T> o;
    for (int64_t i = 0; i < V; ++i) {
      T* row = state.data() + (h * V + i) * K;
      T seen(0), out(0);
      for (int64_t j = 0; j < K; ++j) {
        row[j] *= alpha;
        seen += row[j] * k[static_cast<size_t>(j)];
      }
      const T update = beta * (proj[s.v() + h * V + i] - seen);
      for (int64_t j = 0; j < K; ++j) {
        row[j] += update * k[static_cast<size_t>(j)];
        out += row[j] * q[static_cast<size_t>(j)];
      }
      o.push_back(out / T(std::sqrt(static_cast<double>(K))));
    }
    o = normed(o.data(), p.norm.data(), V, static_cast<double>(s.eps));
    for (int64_t i = 0; i < V; ++i) {
      y[h * V + i] = o[static_cast<size_t>(i)] * silu(proj[s.z() + h * V + i]);
    }
  }
}

// T tokens of one sequence: proj (T, d_proj) -> y (T, H V).
template <typename T>
void delta_scan(const DeltaShape& s, const DeltaParams<T>& p, const T* proj, int64_t tokens,
                std::vector<T>& state, T* y) {
  for (int64_t t = 0; t < tokens; ++t) {
    delta_step(s, p, proj + t * s.d_proj(), state, y + t * s.d_inner());
  }
}

}  // namespace mamba3::ref
