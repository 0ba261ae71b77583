#include "cuda/device.cuh"
#include "ops/increment.h"

namespace mamba3::cuda {

namespace {

template <typename T>
__global__ void increment_kernel(T* counters, int64_t n, T by) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) counters[i] += by;
}

template <typename T>
void add(Context& ctx, const View& counters, int64_t by) {
  constexpr int kThreads = 128;
  const int64_t n = counters.size();
  launch(ctx, "increment", increment_kernel<T>,
         {.blocks = blocks_for(n, kThreads), .threads = kThreads}, data<T>(counters), n,
         static_cast<T>(by));
}

}  // namespace

void increment(Context& ctx, const IncrementArgs& args) {
  if (args.counters.dtype == DType::i64) return add<int64_t>(ctx, args.counters, args.by);
  add<int32_t>(ctx, args.counters, args.by);
}

}  // namespace mamba3::cuda
