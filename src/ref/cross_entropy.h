#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "ref/number.h"

namespace mamba3::ref {

template <typename T>
struct CrossEntropy {
  std::vector<T> nll, lse;  // (M)
};

// hidden (M,D), weight (V,D), targets (M) with -1 for tokens that are not scored.
template <typename T>
CrossEntropy<T> cross_entropy(const std::vector<T>& hidden, const std::vector<T>& weight,
                              std::span<const int32_t> targets, size_t vocab) {
  using std::exp, std::log;
  const size_t M = targets.size(), D = hidden.size() / M;
  CrossEntropy<T> out;
  for (size_t m = 0; m < M; ++m) {
    std::vector<T> logits(vocab, T(0));
    for (size_t v = 0; v < vocab; ++v) {
      for (size_t d = 0; d < D; ++d) logits[v] += hidden[m * D + d] * weight[v * D + d];
    }
    const T most = *std::max_element(logits.begin(), logits.end(), [](const T& a, const T& b) {
      return real_part(a) < real_part(b);
    });
    T sum(0);
    for (const T& logit : logits) sum += exp(logit - most);
    out.lse.push_back(most + log(sum));
    const int32_t target = targets[m];
    out.nll.push_back(target < 0 ? T(0) : out.lse[m] - logits[static_cast<size_t>(target)]);
  }
  return out;
}

}  // namespace mamba3::ref
