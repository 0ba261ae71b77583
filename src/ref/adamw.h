#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/adamw.h"

namespace mamba3::ref {

template <typename T>
struct AdamwTensor {
  std::vector<T> param, grad, m, v;
  bool decay = true;
};

template <typename T>
T global_norm(const std::vector<AdamwTensor<T>>& tensors) {
  using std::sqrt;
  T sum(0);
  for (const AdamwTensor<T>& tensor : tensors) {
    for (const T& g : tensor.grad) sum += g * g;
  }
  return sqrt(sum);
}

// One update of ops/adamw.h with the numbers of `args`; its tensors are not used.
template <typename T>
void adamw(const AdamwArgs& args, std::vector<AdamwTensor<T>>& tensors) {
  using std::pow, std::sqrt;
  const T norm = global_norm(tensors), beta1(args.beta1), beta2(args.beta2), step(args.step);
  const T clip = args.clip > 0 ? std::min(T(1), T(args.clip) / norm) : T(1);
  for (AdamwTensor<T>& t : tensors) {
    const T decay(t.decay ? args.weight_decay : 0);
    for (size_t i = 0; i < t.param.size(); ++i) {
      const T g = t.grad[i] * clip;
      t.m[i] = beta1 * t.m[i] + (T(1) - beta1) * g;
      t.v[i] = beta2 * t.v[i] + (T(1) - beta2) * g * g;
      const T m = t.m[i] / (T(1) - pow(beta1, step)), v = t.v[i] / (T(1) - pow(beta2, step));
      t.param[i] -= T(args.lr) * (m / (sqrt(v) + T(args.eps)) + decay * t.param[i]);
    }
  }
}

}  // namespace mamba3::ref
