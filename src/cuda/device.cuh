#pragma once

// What kernels share: conversions, reductions, and the choice of a template by dtype.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/instructions.cuh"
#include "cuda/launch.cuh"

namespace mamba3::cuda {

inline constexpr int kWarp = 32;

__device__ inline float to_float(float value) {
  return value;
}
__device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline float to_float(__half value) {
  return __half2float(value);
}

template <typename T>
__device__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return __float2half_rn(value);
  }
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, lane));
  }
  return value;
}

// The sum over a block of whole warps, in every thread; `scratch` holds a float for each warp.
// Always in the same order.
__device__ inline float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  __syncthreads();  // an earlier use of scratch is over
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

// The sum over the threads of threadIdx.x, which are a warp, or alone in the block.
__device__ inline float row_of_threads_sum(float value, float* scratch) {
  return blockDim.x == kWarp ? warp_sum(value) : block_sum(value, scratch);
}

__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ inline float silu(float x) {
  return x * sigmoid(x);
}

// The elements of a view as a kernel's pointer type: float, __nv_bfloat16, __half, int32_t, ...
template <typename T>
T* data(const View& view) {
  return static_cast<T*>(view.data);
}

// Calls body.template operator()<T>() for the type of an activation, f32 or bf16.
template <typename Body>
void visit_activation(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body.template operator()<float>();
    case DType::bf16:
      return body.template operator()<__nv_bfloat16>();
    default:
      unsupported("an activation", dtype);
  }
}

// The same for weights, which may also be f16.
template <typename Body>
void visit_weight(DType dtype, Body&& body) {
  if (dtype == DType::f16) return body.template operator()<__half>();
  visit_activation(dtype, body);
}

}  // namespace mamba3::cuda
