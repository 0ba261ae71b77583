#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace mamba3 {

// The GPU that the program would use, and what its kernels find there.
struct GpuInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t memory = 0;         // bytes, all of it
  int64_t shared_memory = 0;  // bytes that a block may have
  // The scan's backward has tensor cores also with N = 128 and S = N/2, which takes the most shared
  // memory.
  bool all_backward_tiles = false;
  bool overlap = false;          // kernels of a step begin while the one before ends; clusters
  bool hopper_products = false;  // wgmma and the copy engine, for the scan and the loss
};

namespace cuda {
// Throws InputError when there is no GPU that can be used.
GpuInfo gpu_info();
}  // namespace cuda

}  // namespace mamba3
