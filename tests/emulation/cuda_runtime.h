#pragma once

// What src/cuda uses of CUDA C++ and its runtime, for the emulator: memory is the host's, streams
// run what they are given at once.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "emulator.h"

// ---- The language ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static

#define threadIdx (mamba3::emulation::position->thread)
#define blockIdx (mamba3::emulation::position->block)
#define blockDim (mamba3::emulation::position->threads)
#define gridDim (mamba3::emulation::position->blocks)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

template <typename A, typename B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;

inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = std::fmod(static_cast<double>(x), 2.0) * M_PI;
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}
inline void sincospi(double x, double* sine, double* cosine) {
  const double angle = std::fmod(x, 2.0) * M_PI;
  *sine = std::sin(angle);
  *cosine = std::cos(angle);
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __cosf(float x) {
  return std::cos(x);
}
inline float __sinf(float x) {
  return std::sin(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
#ifndef __clang__
inline void __builtin_assume(bool) {}
#endif
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

// ---- Threads together: of a warp always all, which is the only mask that is used ----

inline void __syncthreads() {
  mamba3::emulation::wait_for_block();
}
inline int __syncthreads_or(int yes) {
  return mamba3::emulation::count_in_block(yes != 0) > 0;
}
inline void __syncwarp() {
  mamba3::emulation::wait_for_warp();
}

// A lane that there is none of, or that is outside of the group, is the lane itself.
template <typename T>
T shuffled(T value, int from, int width = 32) {
  namespace emulation = mamba3::emulation;
  emulation::post(value);
  const int me = emulation::lane();
  if (from < 0 || from / width != me / width) return value;
  const void* const bytes = emulation::posted(from);
  if (bytes != nullptr) std::memcpy(&value, bytes, sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return shuffled(value, mamba3::emulation::lane() / width * width + lane % width, width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int bits, int width = 32) {
  return shuffled(value, mamba3::emulation::lane() ^ bits, width);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step, int width = 32) {
  return shuffled(value, mamba3::emulation::lane() - step, width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int step, int width = 32) {
  return shuffled(value, mamba3::emulation::lane() + step, width);
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  T least = value;
  mamba3::emulation::for_each_lane(value, [&](int, T other) { least = min(least, other); });
  return least;
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  T most = value;
  mamba3::emulation::for_each_lane(value, [&](int, T other) { most = max(most, other); });
  return most;
}
template <typename T>
unsigned __match_any_sync(unsigned, T value) {
  unsigned lanes = 0;
  mamba3::emulation::for_each_lane(value,
                                   [&](int i, T other) { lanes |= other == value ? 1u << i : 0; });
  return lanes;
}
template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <typename T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = max(before, value);
  return before;
}
template <typename T>
T atomicMin(T* to, T value) {
  const T before = *to;
  *to = min(before, value);
  return before;
}

// ---- The runtime ----

enum cudaError_t {
  cudaSuccess,
  cudaErrorMemoryAllocation,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorUnsupportedPtxVersion,
  cudaErrorStreamCaptureInvalidated
};
enum cudaMemcpyKind { cudaMemcpyDefault, cudaMemcpyDeviceToHost };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

struct cudaDeviceProp {
  char name[256] = "emulated GPU";
  int major = 8, minor = 0, multiProcessorCount = 108;
  size_t totalGlobalMem = size_t{4} << 30;
  size_t sharedMemPerBlockOptin = mamba3::emulation::kSharedBytes;
};
struct cudaFuncAttributes {
  int ptxVersion = 80;
  size_t sharedSizeBytes = 0;
};

// A stream, and while it is recorded what it was given.
namespace mamba3::emulation {
struct Work;
void submit(Work* stream, std::function<void()> work);
}  // namespace mamba3::emulation
using cudaStream_t = mamba3::emulation::Work*;
using cudaGraph_t = mamba3::emulation::Work*;
using cudaGraphExec_t = mamba3::emulation::Work*;
using cudaEvent_t = double*;  // the time of day, in seconds

const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t);
cudaError_t cudaMemset(void* memory, int byte, size_t bytes);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned flags);
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph);
cudaError_t cudaEventCreate(cudaEvent_t* event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t event);

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {};
  return cudaSuccess;
}
