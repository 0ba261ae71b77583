#pragma once

// Sums over the rows of a matrix, in an order that depends on its sizes only: rows are summed in
// groups, then the groups.

#include "cuda/pack.cuh"

namespace mamba3::cuda {

inline constexpr int kSumColumns = 32, kSumRows = 32;  // the threads of a block

// total (n) += the sum over the rows of `rows` (row_count, n); a block walks down its columns.
__global__ static void add_row_sum(const float* rows, int64_t row_count, int64_t n, float* total) {
  __shared__ float sums[kSumRows][kSumColumns];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  float sum = 0;
  if (column < n) {
    for (int64_t row = threadIdx.y; row < row_count; row += kSumRows) sum += rows[row * n + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= n) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  total[column] += sum;
}

inline void add_rows_to(Context& ctx, const char* op, const float* rows, int64_t row_count,
                        int64_t n, float* total) {
  launch(ctx, op, add_row_sum,
         {.blocks = {blocks_for(n, kSumColumns)}, .threads = {kSumColumns, kSumRows}}, rows,
         row_count, n, total);
}

}  // namespace mamba3::cuda
