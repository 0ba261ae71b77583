#pragma once

#include <algorithm>
#include <cstdint>

namespace mamba3::cpu {

// Elements that a thread should at least have for waking it to pay: some microseconds of simple
// arithmetic. A single token's row is below it and runs on the calling thread.
inline constexpr int64_t kGrainElements = 16384;

// The grain of a ThreadPool::parallel_for whose items are rows (or columns) of n elements.
inline int64_t grain_for(int64_t n) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(n, 1));
}

}  // namespace mamba3::cpu
