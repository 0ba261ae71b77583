#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace mamba3::cuda {

// What a launch is made of besides the kernel's arguments.
struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic
};

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace mamba3::cuda
