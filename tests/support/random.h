#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "core/random.h"

namespace mamba3::testing {

// The library's generator, whose seed is printed with every failure while it is in scope.
class Random : public mamba3::Random {
 public:
  explicit Random(uint64_t seed)
      : mamba3::Random(seed), trace_(__FILE__, __LINE__, "seed " + std::to_string(seed)) {}
  Random(const Random&) = delete;
  Random& operator=(const Random&) = delete;

  using mamba3::Random::uniform;
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  // In [low, high).
  int64_t integer(int64_t low, int64_t high) { return low + below(high - low); }

 private:
  ::testing::ScopedTrace trace_;
};

}  // namespace mamba3::testing
