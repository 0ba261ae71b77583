// Schedule. One block: each thread sums every kThreads-th value, then the threads' sums are added
// by halves. The values of a batch are a few hundred kilobytes at most.

#include "cuda/device.cuh"
#include "ops/add_sum.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    add_sum_of_values(const float* values, int64_t n, double* total) {
  __shared__ double sums[kThreads];
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += static_cast<double>(values[i]);
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total += sums[0];
}

}  // namespace

void add_sum(Context& ctx, const AddSumArgs& args) {
  launch(ctx, "add_sum", add_sum_of_values, {.blocks = {1}, .threads = {kThreads}},
         data<float>(args.values), args.values.size(), data<double>(args.total));
}

}  // namespace mamba3::cuda
