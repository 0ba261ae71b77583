#include "core/gpu_info.h"
#include "cuda/exp_gemm.cuh"
#include "cuda/launch.cuh"
#include "cuda/mixer_tiles.cuh"

namespace mamba3::cuda {

GpuInfo gpu_info() {
  const auto stream = make_stream();  // says what is wrong where there is no GPU
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "asking for the GPU's properties");
  return {.name = device.name,
          .major = device.major,
          .minor = device.minor,
          .multiprocessors = device.multiProcessorCount,
          .memory = static_cast<int64_t>(device.totalGlobalMem),
          .shared_memory = static_cast<int64_t>(device.sharedMemPerBlockOptin),
          .all_backward_tiles = mixer_scan_backward_fits_tiles(*stream, {.N = 128, .S = 64}),
          .overlap = can_overlap(),
          .hopper_products = exp_gemm::available()};
}

}  // namespace mamba3::cuda
