#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>

namespace mamba3::testing {

// Random numbers that are the same with every standard library (SplitMix64, Steele et al. 2014).
// The seed is printed with every failure while the generator is in scope.
class Random {
 public:
  explicit Random(uint64_t seed)
      : state_(seed), trace_(__FILE__, __LINE__, "seed " + std::to_string(seed)) {}
  Random(const Random&) = delete;
  Random& operator=(const Random&) = delete;

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // In [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // In [low, high).
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low));
  }
  // Standard normal (Box-Muller).
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  uint64_t state_;
  ::testing::ScopedTrace trace_;
};

}  // namespace mamba3::testing
