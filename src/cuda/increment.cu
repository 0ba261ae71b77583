#include "cuda/device.cuh"
#include "ops/increment.h"

namespace mamba3::cuda {

namespace {

__global__ void increment_kernel(int32_t* counters, int64_t n, int32_t by) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) counters[i] += by;
}

}  // namespace

void increment(Context& ctx, const IncrementArgs& args) {
  constexpr int kThreads = 128;
  const int64_t n = args.counters.size();
  launch(ctx, "increment", increment_kernel,
         {.blocks = blocks_for(n, kThreads), .threads = kThreads}, data<int32_t>(args.counters), n,
         static_cast<int32_t>(args.by));
}

}  // namespace mamba3::cuda
