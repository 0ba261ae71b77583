// Schedule. An item is a group of channels of a row. Forward: an item has a warp if it is short,
// else a block, and stays in the registers of its threads; an item that is too long for that, or
// whose elements cannot be read four at a time, is read twice, the second time from the cache.
// Backward: a block has a few rows of one group; first its warps take the rows' sums, then its
// threads walk down the columns, so that each has the sum for d_weight in a register. Those sums of
// all blocks are added by column_sums.cuh.

#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/overlap.cuh"
#include "ops/grouped_rms_norm.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kRowsOfBackward = 16;  // of a block
constexpr int kPack = 4;
constexpr int kMostPacks = 4;  // of an item that a thread holds

template <typename T>
struct Forward {
  const T* x;
  int64_t x_stride;
  const float* weight;
  T* out;  // may be x
  int64_t out_stride;
  int64_t items, groups, width;  // width: channels of a group
  float eps;
};

// The item of a row of threads of a block, which are whole warps.
struct Item {
  int64_t index, row, first;  // first: the channel where its group begins
};

__device__ Item item_of_thread(int64_t groups, int64_t width) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  return {.index = index, .row = index / groups, .first = index % groups * width};
}

// 1/sqrt(mean of squares + eps) from the squares of each thread of an item; a block has several
// items only if they are a warp each.
__device__ float rstd_of(float squares, int64_t width, float eps) {
  __shared__ float scratch[kWarp];
  squares = row_of_threads_sum(squares, scratch);
  return 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
}

// threads.x have an item, a thread kPacks packs of it; threads.y are items.
template <int kPacks, typename T>
__global__ void __launch_bounds__(1024) forward_once(Forward<T> a) {
  const Item item = item_of_thread(a.groups, a.width);
  const bool valid = item.index < a.items;  // in all threads of a warp, or of a block of one item
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto column = [&](int i) { return static_cast<int64_t>(thread + i * threads) * kPack; };
  float x[kPacks][kPack] = {}, weight[kPacks][kPack];
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) < a.width) load(a.weight + item.first + column(i), weight[i]);
  }
  wait_for_earlier_kernels();
  if (!valid) return;
  const T* const from = a.x + item.row * a.x_stride + item.first;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) < a.width) load(from + column(i), x[i]);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) squares += x[i][j] * x[i][j];
  }
  const float rstd = rstd_of(squares, a.width, a.eps);
  T* const to = a.out + item.row * a.out_stride + item.first;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) >= a.width) break;
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[i][j] = x[i][j] * rstd * weight[i][j];
    store(x[i], to + column(i));
  }
}

// As above, for items of any length, n elements at a time.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads) forward(Forward<T> a) {
  const Item item = item_of_thread(a.groups, a.width);
  if (item.index >= a.items) return;  // a whole warp
  const int first = static_cast<int>(threadIdx.x) * n, step = static_cast<int>(blockDim.x) * n;
  const T* const from = a.x + item.row * a.x_stride + item.first;
  float squares = 0;
  for (int64_t i = first; i < a.width; i += step) {
    float x[n];
    load(from + i, x);
#pragma unroll
    for (int j = 0; j < n; ++j) squares += x[j] * x[j];
  }
  const float rstd = rstd_of(squares, a.width, a.eps);
  // Each thread has the same elements as above, so that it may write over what it read.
  T* const to = a.out + item.row * a.out_stride + item.first;
  for (int64_t i = first; i < a.width; i += step) {
    float x[n], weight[n];
    load(from + i, x);
    load(a.weight + item.first + i, weight);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = x[j] * rstd * weight[j];
    store(x, to + i);
  }
}

// Blocks for items that have so many threads each: a block of several items if they are a warp.
Grid grid_of_items(int64_t items, unsigned threads) {
  const unsigned together = threads == kWarp ? kWarps : 1;
  return {.blocks = {blocks_for(items, together)}, .threads = {threads, together}};
}

// Few items have as many threads as can take a part, for a short time; many items have small
// blocks, of which many are on the chip, for a high rate.
template <typename T>
void launch_forward_once(Context& ctx, const Forward<T>& a) {
  const int64_t packs = a.width / kPack;
  const bool few = a.items <= 4 * ctx.stream->multiprocessors;
  const auto launch_packs = [&]<int kPacks>() {
    const unsigned threads = blocks_for(packs, kPacks * kWarp) * kWarp;
    launch_overlapping(ctx, "grouped_rms_norm", forward_once<kPacks, T>,
                       grid_of_items(a.items, threads), 1, a);
  };
  if (packs <= (few ? 1024 : 128)) return launch_packs.template operator()<1>();
  if (packs <= (few ? 2048 : 512)) return launch_packs.template operator()<2>();
  launch_packs.template operator()<kMostPacks>();
}

template <typename T>
struct Backward {
  const T* x;
  int64_t x_stride;
  const float* weight;
  const T* d_out;
  int64_t d_out_stride;
  T* d_x;  // may be d_out
  int64_t d_x_stride;
  float* partial;  // (blocks of rows, groups * width), of d_weight
  int64_t M, width;
  unsigned groups;
  float eps;
};

// With n = x rstd and d_n = d_out weight:
//   d_x = rstd (d_n - n mean(d_n n)),   d_weight += d_out n.
template <int n, typename T>
__global__ void __launch_bounds__(kThreads) backward(Backward<T> a) {
  __shared__ float rstds[kRowsOfBackward], alongs[kRowsOfBackward];  // along: mean(d_n n)
  const int64_t block = blockIdx.x / a.groups;                       // of rows
  const int64_t first = blockIdx.x % a.groups * a.width;             // the group's first channel
  const int64_t m0 = block * kRowsOfBackward;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRowsOfBackward), a.M - m0));
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const T* const x_rows = a.x + m0 * a.x_stride + first;
  const T* const d_rows = a.d_out + m0 * a.d_out_stride + first;
  for (int row = warp; row < rows; row += warps) {
    float squares = 0, sum = 0;
    for (int64_t i = lane * n; i < a.width; i += kWarp * n) {
      float x[n], d[n], weight[n];
      load(x_rows + row * a.x_stride + i, x);
      load(d_rows + row * a.d_out_stride + i, d);
      load(a.weight + first + i, weight);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        squares += x[j] * x[j];
        sum += d[j] * weight[j] * x[j];
      }
    }
    squares = warp_sum(squares);
    sum = warp_sum(sum);
    if (lane == 0) {
      const float rstd = 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
      rstds[row] = rstd;
      alongs[row] = sum * rstd / static_cast<float>(a.width);
    }
  }
  __syncthreads();
  // From here on a thread alone reads the elements of d_out that it writes over.
  T* const d_x_rows = a.d_x + m0 * a.d_x_stride + first;
  float* const partial = a.partial + block * a.groups * a.width + first;
  for (int64_t i = thread * n; i < a.width; i += threads * n) {
    float weight[n], d_weight[n] = {};
    load(a.weight + first + i, weight);
#pragma unroll 4
    for (int row = 0; row < rows; ++row) {
      float x[n], d[n];
      load(x_rows + row * a.x_stride + i, x);
      load(d_rows + row * a.d_out_stride + i, d);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const float normed = x[j] * rstds[row];
        d_weight[j] += d[j] * normed;
        d[j] = (d[j] * weight[j] - normed * alongs[row]) * rstds[row];
      }
      store(d, d_x_rows + row * a.d_x_stride + i);
    }
    store(d_weight, partial + i);
  }
}

// Whole warps, as many as have packs of an item to read, at most a block's.
unsigned threads_for(int64_t width, int n) {
  return std::min<unsigned>(kThreads, blocks_for(width, n * kWarp) * kWarp);
}

}  // namespace

void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args) {
  const int64_t M = args.x.dim(0), width = args.x.dim(1) / args.groups;
  visit_activation(args.x.dtype, [&]<typename T>() {
    const Forward<T> a{.x = data<T>(args.x),
                       .x_stride = row_stride(args.x),
                       .weight = data<float>(args.weight),
                       .out = data<T>(args.out),
                       .out_stride = row_stride(args.out),
                       .items = M * args.groups,
                       .groups = args.groups,
                       .width = width,
                       .eps = args.eps};
    visit_packs<kPack>(width, {args.x, args.weight, args.out}, [&]<int n>() {
      if (n == kPack && width <= int64_t{1024} * kMostPacks * kPack) {
        launch_forward_once(ctx, a);
      } else {
        launch(ctx, "grouped_rms_norm", forward<n, T>,
               grid_of_items(a.items, threads_for(width, n)), a);
      }
    });
  });
}

void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args) {
  const int64_t M = args.x.dim(0), C = args.x.dim(1), width = C / args.groups;
  const unsigned groups = static_cast<unsigned>(args.groups);
  const unsigned blocks = blocks_for(M, kRowsOfBackward);
  ScratchScope scope(ctx.scratch);
  float* const partial = scope.take<float>(blocks * C).data();
  visit_activation(args.x.dtype, [&]<typename T>() {
    const Backward<T> a{.x = data<T>(args.x),
                        .x_stride = row_stride(args.x),
                        .weight = data<float>(args.weight),
                        .d_out = data<T>(args.d_out),
                        .d_out_stride = row_stride(args.d_out),
                        .d_x = data<T>(args.d_x),
                        .d_x_stride = row_stride(args.d_x),
                        .partial = partial,
                        .M = M,
                        .width = width,
                        .groups = groups,
                        .eps = args.eps};
    visit_packs<kPack>(width, {args.x, args.weight, args.d_out, args.d_x}, [&]<int n>() {
      launch(ctx, "grouped_rms_norm_backward", backward<n, T>,
             {.blocks = {blocks * groups}, .threads = {threads_for(width, n)}}, a);
    });
  });
  add_rows_to(ctx, "grouped_rms_norm_backward", partial, blocks, C, data<float>(args.d_weight));
}

}  // namespace mamba3::cuda
