#pragma once

// Loads and stores of several elements at once, and the views that allow them.

#include "cuda/device.cuh"

namespace mamba3::cuda {

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T at[n];
};

template <int n, typename T>
__device__ void load(const T* from, float (&to)[n]) {
  const Pack<T, n> pack = *reinterpret_cast<const Pack<T, n>*>(from);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = to_float(pack.at[i]);
}

template <int n, typename T>
__device__ void store(const float (&from)[n], T* to) {
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) pack.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}

// The leading dim of a view of rows: its stride, which a single row need not have.
inline int64_t row_stride(const View& rows) {
  return rows.dim(0) > 1 ? rows.stride(0) : rows.dim(1);
}

// Whether rows begin at multiples of n elements; an empty view does not object.
inline bool packs(const View& rows, int n) {
  if (rows.empty()) return true;
  const auto address = reinterpret_cast<uintptr_t>(rows.data);
  const bool start = address % static_cast<uintptr_t>(n * size_of(rows.dtype)) == 0;
  return start && (rows.rank < 2 || row_stride(rows) % n == 0);
}

// Calls body.template operator()<n>(): n elements at a time where all the views of rows, of a width
// that n divides, allow it, else one.
template <int n, typename Body>
void visit_packs(int64_t width, std::initializer_list<View> views, Body&& body) {
  bool fit = width % n == 0;
  for (const View& view : views) fit = fit && packs(view, n);
  return fit ? body.template operator()<n>() : body.template operator()<1>();
}

// For kernels without a sum over a row: threads.x share the columns, n at a time, threads.y are
// rows; blocks.x go down the rows, blocks.y along the columns.
inline Grid grid_of_elements(int64_t rows, int64_t width, int n) {
  constexpr int kThreads = 256;
  const int64_t packs = (width + n - 1) / n;
  unsigned across = kWarp;
  while (across < kThreads && across < packs) across *= 2;
  const unsigned down = kThreads / across;
  return {.blocks = {blocks_for(rows, down), blocks_for(packs, across)}, .threads = {across, down}};
}

// This thread's place in such a grid.
__device__ inline int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
template <int n>
__device__ int64_t column_of_thread() {
  return (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * n;
}

}  // namespace mamba3::cuda
