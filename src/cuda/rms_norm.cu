// Schedule. Forward: a block a row, or if rows are short a warp, in whose registers it stays. Rows
// that are too long for that, or whose elements cannot be read four at a time, are read twice, the
// second time from the cache, by a block, or a warp if they are short. Backward: a block has a few
// rows; first its warps take the rows' sums, then its threads walk down the columns, so that each
// has the sum for d_weight in a register; if there are fewer columns than threads, they share the
// rows. Those sums of all blocks are added by column_sums.cuh.

#include "cuda/column_sums.cuh"
#include "cuda/overlap.cuh"
#include "ops/rms_norm.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kLongRow = 1024;   // from here on a row has a block
constexpr int kRowsOfBackward = 16;  // of a block
constexpr int kPack = 4;

struct Forward {
  const float* residual;
  int64_t residual_stride;
  const void* delta;  // or null
  int64_t delta_stride;
  const float* weight;
  float* residual_out;  // may be residual; or null
  int64_t residual_out_stride;
  void* out;
  int64_t out_stride;
  float* rstd;  // or null
  int64_t M, D;
  float eps;
};

// n elements of the stream from i on, the delta included.
template <int n, typename Delta>
__device__ void load_stream(const Forward& a, int64_t m, int64_t i, float (&x)[n]) {
  load(a.residual + m * a.residual_stride + i, x);
  if (a.delta == nullptr) return;
  float delta[n];
  load(static_cast<const Delta*>(a.delta) + m * a.delta_stride + i, delta);
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] += delta[j];
}

template <int n, bool kBlockARow, typename Delta, typename Out>
__global__ void __launch_bounds__(kThreads) forward(Forward a) {
  __shared__ float scratch[kWarps];
  constexpr int kSide = kBlockARow ? kThreads : kWarp;  // threads of a row
  const int64_t m = static_cast<int64_t>(blockIdx.x) * (kThreads / kSide) + threadIdx.x / kSide;
  const int first = static_cast<int>(threadIdx.x) % kSide * n;
  if (m >= a.M) return;  // a whole warp or block
  float squares = 0;
  for (int64_t i = first; i < a.D; i += kSide * n) {
    float x[n];
    load_stream<n, Delta>(a, m, i, x);
#pragma unroll
    for (int j = 0; j < n; ++j) squares += x[j] * x[j];
  }
  squares = kBlockARow ? block_sum(squares, scratch) : warp_sum(squares);
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(a.D) + a.eps);
  if (a.rstd != nullptr && first == 0) a.rstd[m] = rstd;
  // Each thread has the same elements as above, so that it may write over what it read.
  for (int64_t i = first; i < a.D; i += kSide * n) {
    float x[n], weight[n];
    load_stream<n, Delta>(a, m, i, x);
    if (a.residual_out != nullptr) store(x, a.residual_out + m * a.residual_out_stride + i);
    load(a.weight + i, weight);
#pragma unroll
    for (int j = 0; j < n; ++j) x[j] = x[j] * rstd * weight[j];
    store(x, static_cast<Out*>(a.out) + m * a.out_stride + i);
  }
}

constexpr int kMostPacks = 4;  // of a row that a thread holds

// threads.x have a row, a thread kPacks packs of it; threads.y are rows, several only if they are a
// warp each.
template <int kPacks, typename Delta, typename Out>
__global__ void __launch_bounds__(1024) forward_once(Forward a) {
  __shared__ float scratch[kWarp];
  const int64_t m = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto column = [&](int i) { return static_cast<int64_t>(thread + i * threads) * kPack; };
  float x[kPacks][kPack] = {}, weight[kPacks][kPack];
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) < a.D) load(a.weight + column(i), weight[i]);
  }
  wait_for_earlier_kernels();
  if (m >= a.M) return;  // a whole warp or block
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) < a.D) load_stream<kPack, Delta>(a, m, column(i), x[i]);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) squares += x[i][j] * x[i][j];
  }
  squares = row_of_threads_sum(squares, scratch);
  const float rstd = 1.0f / sqrtf(squares / static_cast<float>(a.D) + a.eps);
  if (a.rstd != nullptr && thread == 0) a.rstd[m] = rstd;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (column(i) >= a.D) break;
    if (a.residual_out != nullptr) {
      store(x[i], a.residual_out + m * a.residual_out_stride + column(i));
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[i][j] = x[i][j] * rstd * weight[i][j];
    store(x[i], static_cast<Out*>(a.out) + m * a.out_stride + column(i));
  }
}

// Few rows have as many threads as can take a part, for a short time; many rows have few threads
// each, of which many are on the chip, for a high rate.
template <typename Delta, typename Out>
void launch_forward_once(Context& ctx, const Forward& a) {
  const int64_t packs = (a.D + kPack - 1) / kPack;
  const bool few = a.M <= 4 * ctx.stream->multiprocessors;
  const auto launch_packs = [&]<int kPacks>() {
    const unsigned threads = blocks_for(packs, kPacks * kWarp) * kWarp;
    const unsigned rows = threads == kWarp && !few ? kWarps : 1;
    launch_overlapping(ctx, "rms_norm", forward_once<kPacks, Delta, Out>,
                       {.blocks = {blocks_for(a.M, rows)}, .threads = {threads, rows}}, 1, a);
  };
  if (packs <= (few ? 1024 : 128)) return launch_packs.template operator()<1>();
  if (packs <= (few ? 2048 : 512)) return launch_packs.template operator()<2>();
  launch_packs.template operator()<kMostPacks>();
}

struct Backward {
  const float* residual;
  int64_t residual_stride;
  const float* weight;
  const float* rstd;
  const void* d_out;
  int64_t d_out_stride;
  float* d_residual;
  int64_t d_residual_stride;
  void* copy;  // of d_residual, or null
  int64_t copy_stride;
  float* partial;  // (blocks, D), of d_weight
  int64_t M, D;
};

// With n = x rstd and d_n = d_out weight:
//   d_residual += rstd (d_n - n mean(d_n n)),   d_weight += d_out n.
template <int n, typename T, typename Copy>
__global__ void __launch_bounds__(kThreads) backward(Backward a) {
  __shared__ float rstds[kRowsOfBackward], alongs[kRowsOfBackward];  // along: rstd mean(d_n n)
  const int64_t m0 = static_cast<int64_t>(blockIdx.x) * kRowsOfBackward;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRowsOfBackward), a.M - m0));
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const float* const residual = a.residual + m0 * a.residual_stride;
  const T* const d_out = static_cast<const T*>(a.d_out) + m0 * a.d_out_stride;
  for (int row = warp; row < rows; row += kWarps) {
    float sum = 0;
    for (int64_t i = lane * n; i < a.D; i += kWarp * n) {
      float x[n], d[n], weight[n];
      load(residual + row * a.residual_stride + i, x);
      load(d_out + row * a.d_out_stride + i, d);
      load(a.weight + i, weight);
#pragma unroll
      for (int j = 0; j < n; ++j) sum += d[j] * weight[j] * x[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float rstd = a.rstd[m0 + row];
      rstds[row] = rstd;
      alongs[row] = sum * rstd * rstd / static_cast<float>(a.D);
    }
  }
  __syncthreads();
  float* const d_residual = a.d_residual + m0 * a.d_residual_stride;
  // Where a walk down all columns leaves threads over, several walks share the rows.
  const int across = static_cast<int>(min(static_cast<int64_t>(kThreads), (a.D + n - 1) / n));
  const int walks = min(kThreads / across, kRowsOfBackward);
  const int walk = static_cast<int>(threadIdx.x) / across;
  alignas(16) __shared__ float shared_sums[kThreads * n];  // (walks, D)
  for (int64_t i = static_cast<int64_t>(threadIdx.x) % across * n; i < a.D && walk < walks;
       i += across * n) {
    float weight[n], d_weight[n] = {};
    load(a.weight + i, weight);
#pragma unroll 4
    for (int row = walk; row < rows; row += walks) {
      float x[n], d[n], total[n];
      load(residual + row * a.residual_stride + i, x);
      load(d_out + row * a.d_out_stride + i, d);
      load(d_residual + row * a.d_residual_stride + i, total);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        total[j] += (d[j] * weight[j] - x[j] * alongs[row]) * rstds[row];
        d_weight[j] += d[j] * (x[j] * rstds[row]);
      }
      store(total, d_residual + row * a.d_residual_stride + i);
      if (a.copy != nullptr) {
        store(total, static_cast<Copy*>(a.copy) + (m0 + row) * a.copy_stride + i);
      }
    }
    if (walks > 1) {
      store(d_weight, shared_sums + walk * across * n + i);
    } else {
      store(d_weight, a.partial + blockIdx.x * a.D + i);
    }
  }
  if (walks == 1) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.D; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < walks; ++w) sum += shared_sums[w * across * n + i];
    a.partial[blockIdx.x * a.D + i] = sum;
  }
}

int64_t stride_of(const View& rows) {
  return rows.empty() ? 0 : row_stride(rows);
}

}  // namespace

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  const Forward forward_args{.residual = data<float>(args.residual),
                             .residual_stride = stride_of(args.residual),
                             .delta = args.delta.data,
                             .delta_stride = stride_of(args.delta),
                             .weight = data<float>(args.weight),
                             .residual_out = data<float>(args.residual_out),
                             .residual_out_stride = stride_of(args.residual_out),
                             .out = args.out.data,
                             .out_stride = stride_of(args.out),
                             .rstd = data<float>(args.rstd),
                             .M = M,
                             .D = D,
                             .eps = args.eps};
  visit_activation(args.delta.dtype, [&]<typename Delta>() {  // f32 if there is none
    visit_activation(args.out.dtype, [&]<typename Out>() {
      visit_packs<kPack>(
          D, {args.residual, args.delta, args.weight, args.residual_out, args.out}, [&]<int n>() {
            if (n == kPack && D <= int64_t{1024} * kMostPacks * kPack) {
              launch_forward_once<Delta, Out>(ctx, forward_args);
            } else if (D >= kLongRow) {
              launch(ctx, "rms_norm", forward<n, true, Delta, Out>,
                     {.blocks = {blocks_for(M, 1)}, .threads = {kThreads}}, forward_args);
            } else {
              launch(ctx, "rms_norm", forward<n, false, Delta, Out>,
                     {.blocks = {blocks_for(M, kWarps)}, .threads = {kThreads}}, forward_args);
            }
          });
    });
  });
}

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  const unsigned blocks = blocks_for(M, kRowsOfBackward);
  ScratchScope scope(ctx.scratch);
  float* const partial = scope.take<float>(blocks * D).data();
  const Backward backward_args{.residual = data<float>(args.residual),
                               .residual_stride = stride_of(args.residual),
                               .weight = data<float>(args.weight),
                               .rstd = data<float>(args.rstd),
                               .d_out = args.d_out.data,
                               .d_out_stride = stride_of(args.d_out),
                               .d_residual = data<float>(args.d_residual),
                               .d_residual_stride = stride_of(args.d_residual),
                               .copy = args.d_residual_copy.data,
                               .copy_stride = stride_of(args.d_residual_copy),
                               .partial = partial,
                               .M = M,
                               .D = D};
  visit_activation(args.d_out.dtype, [&]<typename T>() {
    visit_activation(args.d_residual_copy.dtype, [&]<typename Copy>() {  // f32 if there is none
      visit_packs<kPack>(
          D, {args.residual, args.weight, args.d_out, args.d_residual, args.d_residual_copy},
          [&]<int n>() {
            launch(ctx, "rms_norm_backward", backward<n, T, Copy>,
                   {.blocks = {blocks}, .threads = {kThreads}}, backward_args);
          });
    });
  });
  add_rows_to(ctx, "rms_norm_backward", partial, blocks, D, data<float>(args.d_weight));
}

}  // namespace mamba3::cuda
