#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "ops/sample.h"

namespace mamba3::ref {

// The probabilities that ops/sample.h draws a row from: logits (vocab), history of this row.
inline std::vector<double> sample_probabilities(const SampleArgs& args, std::vector<double> logits,
                                                std::span<const int32_t> history) {
  const std::vector<double> original = logits;
  for (const int32_t id : history) {
    if (id < 0) continue;
    const double x = original[static_cast<size_t>(id)], penalty = args.repeat_penalty;
    logits[static_cast<size_t>(id)] = x > 0 ? x / penalty : x * penalty;
  }
  std::vector<size_t> ranks(logits.size());
  std::iota(ranks.begin(), ranks.end(), size_t{0});
  std::stable_sort(ranks.begin(), ranks.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  if (args.temperature == 0) ranks.resize(1);
  if (args.top_k > 0) ranks.resize(std::min(ranks.size(), static_cast<size_t>(args.top_k)));
  const double most = logits[ranks[0]];
  const auto weight = [&](size_t id) { return std::exp(logits[id] - most); };
  double total = 0, sum = 0;
  for (const size_t id : ranks) total += weight(id);
  size_t kept = 0;
  while (kept < ranks.size() && sum < static_cast<double>(args.top_p) * total &&
         weight(ranks[kept]) >= static_cast<double>(args.min_p)) {
    sum += weight(ranks[kept++]);
  }
  ranks.resize(kept);
  std::vector<double> p(logits.size(), 0.0);
  const double temperature = args.temperature == 0 ? 1 : static_cast<double>(args.temperature);
  for (const size_t id : ranks) p[id] = std::exp((logits[id] - most) / temperature);
  const double norm = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= norm;
  return p;
}

}  // namespace mamba3::ref
