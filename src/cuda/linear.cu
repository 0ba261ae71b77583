// Schedule. A few rows of x (decode) are bound by reading the weight: one row, or up to four of
// f32, by cuda/gemv.cuh, up to eight of bf16 by cuda/few_rows.cuh. More rows are a matrix product
// (cuda/gemm.h). A bias is written to y first, and the product added to it. In the
// backward, the gradient is converted if its dtype is not that of the other operand.

#include "cuda/column_sums.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/gemm.h"
#include "cuda/gemv.cuh"
#include "ops/linear.h"
#include "ops/linear_swiglu.h"

namespace mamba3::cuda {

namespace {

constexpr int kFewRows = 4;  // of x: up to here without a matrix product

// One row of x needs so little arithmetic that outputs one at a time are best; if rows of the
// weight are long, with more loads and smaller blocks. With more rows of x, outputs share its
// conversions.
using OneOutput = GemvTile<1, 4, 4>;
using OneLongOutput = GemvTile<1, 8, 8, 4>;
template <int kM>
using TwoOutputs = GemvTile<2, 4, kM == 2 ? 3 : 2>;

template <typename T, typename Y, int kEach, typename Tile, bool kSwiglu>
bool launch_row(Context& ctx, const Gemv& g) {
  if (kSwiglu && gemv_warps<Tile>(g.K, kEach) == Tile::kWarps) return false;  // no place for gates
  launch_gemv<T, Y, 1, kEach, Tile, kSwiglu>(ctx, kSwiglu ? "linear_swiglu" : "linear", g);
  return true;
}

// Returns false, and does nothing, where that cannot be with SwiGLU.
template <typename T, typename Y, int kEach, bool kSwiglu = false>
bool one_row(Context& ctx, const Gemv& g) {
  if (g.K >= OneLongOutput::kLoads * kWarp * kEach) {
    return launch_row<T, Y, kEach, OneLongOutput, kSwiglu>(ctx, g);
  }
  return launch_row<T, Y, kEach, OneOutput, kSwiglu>(ctx, g);
}

template <typename T, typename Y, int kM, int kEach>
void rows_of(Context& ctx, const Gemv& g) {
  if constexpr (kM == 1) {
    one_row<T, Y, kEach>(ctx, g);
  } else {
    launch_gemv<T, Y, kM, kEach, TwoOutputs<kM>>(ctx, "linear", g);
  }
}

Gemv gemv_of(const View& x, const View& weight, const View& y) {
  return {.x = x.data,
          .x_stride = row_stride(x),
          .weight = weight.data,
          .bias = nullptr,
          .y = y.data,
          .y_stride = row_stride(y),
          .N = y.dim(1),
          .K = x.dim(1),
          .warps = 1,
          .accumulate = false};
}

// One row, or a few that have no kernel on tensor cores.
void multiply_rows(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.x.dim(0), K = args.x.dim(1);
  Gemv g = gemv_of(args.x, args.weight, args.y);
  g.bias = data<float>(args.bias), g.accumulate = args.accumulate;
  visit_activation(args.weight.dtype, [&]<typename T>() {
    visit_activation(args.y.dtype, [&]<typename Y>() {
      constexpr int kEach = 16 / sizeof(T);
      visit_packs<kEach>(K, {args.x, args.weight}, [&]<int each>() {
        switch (M) {
          case 1:
            return rows_of<T, Y, 1, each>(ctx, g);
          case 2:
            return rows_of<T, Y, 2, each>(ctx, g);
          case 3:
            return rows_of<T, Y, 3, each>(ctx, g);
          default:
            return rows_of<T, Y, kFewRows, each>(ctx, g);
        }
      });
    });
  });
}

// A few rows on tensor cores.
few_rows::Product product_of(const View& x, const View& weight, const View& y) {
  return {.x = data<bf16>(x),
          .x_stride = row_stride(x),
          .weight = data<bf16>(weight),
          .bias = nullptr,
          .y = y.data,
          .y_stride = row_stride(y),
          .M = static_cast<int>(x.dim(0)),
          .N = y.dim(1),
          .K = x.dim(1)};
}

template <typename Y>
__global__ void add_bias_kernel(const float* bias, Y* y, int64_t stride, int64_t M, int64_t N,
                                bool accumulate) {
  const int64_t m = row_of_thread(), n = column_of_thread<1>();
  if (m >= M || n >= N) return;
  Y& value = y[m * stride + n];
  value = from_float<Y>(accumulate ? to_float(value) + bias[n] : bias[n]);
}

void add_bias(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.y.dim(0), N = args.y.dim(1);
  visit_activation(args.y.dtype, [&]<typename Y>() {
    launch(ctx, "linear", add_bias_kernel<Y>, grid_of_elements(M, N, 1), data<float>(args.bias),
           data<Y>(args.y), row_stride(args.y), M, N, args.accumulate);
  });
}

template <int kEach, typename From, typename To>
__global__ void convert_kernel(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                               int64_t M, int64_t N) {
  const int64_t m = row_of_thread(), n = column_of_thread<kEach>();
  if (m >= M || n >= N) return;
  float values[kEach];
  load(from + m * from_stride + n, values);
  store(values, to + m * to_stride + n);
}

// Rows of another dtype in scratch, aligned for cuBLASLt.
View converted(Context& ctx, const View& rows, DType dtype, ScratchScope& scope) {
  const int64_t M = rows.dim(0), N = rows.dim(1), stride = (N + 7) / 8 * 8;
  View made = rows;
  made.data = scope.take<char>(M * stride * size_of(dtype)).data();
  made.dtype = dtype;
  made.strides = {stride, 1};
  visit_activation(rows.dtype, [&]<typename From>() {
    visit_activation(dtype, [&]<typename To>() {
      visit_packs<4>(N, {rows, made}, [&]<int each>() {
        launch(ctx, "linear_backward", convert_kernel<each, From, To>, grid_of_elements(M, N, each),
               data<From>(rows), row_stride(rows), data<To>(made), stride, M, N);
      });
    });
  });
  return made;
}

constexpr int64_t kBiasRows = 128;  // that a block sums

template <typename T>
__global__ void column_sums(const T* rows, int64_t stride, int64_t M, int64_t N, float* partial) {
  __shared__ float sums[kSumRows][kSumColumns];
  const int64_t n = static_cast<int64_t>(blockIdx.y) * kSumColumns + threadIdx.x;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBiasRows;
  const int64_t end = min(begin + kBiasRows, M);
  float sum = 0;
  if (n < N) {
    for (int64_t m = begin + threadIdx.y; m < end; m += kSumRows)
      sum += to_float(rows[m * stride + n]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || n >= N) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  partial[blockIdx.x * N + n] = sum;
}

void bias_backward(Context& ctx, const View& d_y, const View& d_bias) {
  const int64_t M = d_y.dim(0), N = d_y.dim(1);
  const unsigned groups = blocks_for(M, kBiasRows);
  ScratchScope scope(ctx.scratch);
  float* const partial = scope.take<float>(groups * N).data();
  visit_activation(d_y.dtype, [&]<typename T>() {
    launch(ctx, "linear_backward", column_sums<T>,
           {.blocks = {groups, blocks_for(N, kSumColumns)}, .threads = {kSumColumns, kSumRows}},
           data<T>(d_y), row_stride(d_y), M, N, partial);
  });
  add_rows_to(ctx, "linear_backward", partial, groups, N, data<float>(d_bias));
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.x.dim(0), N = args.weight.dim(0), K = args.weight.dim(1);
  if (M == 0) return;
  if (M > 1 && few_rows::serves(args.x, args.weight)) {
    few_rows::Product product = product_of(args.x, args.weight, args.y);
    product.bias = data<float>(args.bias), product.accumulate = args.accumulate;
    return visit_activation(args.y.dtype, [&]<typename Y>() {
      few_rows::launch_multiply<false, Y>(ctx, "linear", product);
    });
  }
  if (M <= kFewRows) return multiply_rows(ctx, args);
  if (!args.bias.empty()) add_bias(ctx, args);
  const bool add = args.accumulate || !args.bias.empty();
  gemm(ctx, "linear",
       {.transpose_b = true,
        .M = M,
        .N = N,
        .K = K,
        .dtype = args.x.dtype,
        .a = args.x.data,
        .lda = row_stride(args.x),
        .b = args.weight.data,
        .ldb = K,
        .beta = add ? 1.0f : 0.0f,
        .dtype_c = args.y.dtype,
        .c = args.y.data,
        .ldc = row_stride(args.y)});
}

bool linear_swiglu(Context& ctx, const LinearSwigluArgs& args) {
  if (args.out.dtype != DType::bf16 || !few_rows::serves(args.x, args.weight)) return false;
  if (args.x.dim(0) == 0) return true;
  if (args.x.dim(0) > 1) {
    few_rows::launch_multiply<true, bf16>(ctx, "linear_swiglu",
                                          product_of(args.x, args.weight, args.out));
    return true;
  }
  return one_row<bf16, bf16, 8, true>(ctx, gemv_of(args.x, args.weight, args.out));
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const int64_t M = args.d_y.dim(0), N = args.d_y.dim(1);
  ScratchScope scope(ctx.scratch);
  View d_y = args.d_y;
  if (!args.d_x.empty() || !args.d_weight.empty()) {
    const DType dtype = args.d_x.empty() ? args.x.dtype : args.weight.dtype;
    if (dtype != d_y.dtype) d_y = converted(ctx, d_y, dtype, scope);
  }
  if (!args.d_x.empty()) {
    const int64_t K = args.d_x.dim(1);
    gemm(ctx, "linear_backward",
         {.M = M,
          .N = K,
          .K = N,
          .dtype = d_y.dtype,
          .a = d_y.data,
          .lda = row_stride(d_y),
          .b = args.weight.data,
          .ldb = K,
          .beta = args.accumulate_d_x ? 1.0f : 0.0f,
          .dtype_c = args.d_x.dtype,
          .c = args.d_x.data,
          .ldc = row_stride(args.d_x)});
  }
  if (!args.d_weight.empty()) {
    const int64_t K = args.x.dim(1);
    gemm(ctx, "linear_backward",
         {.transpose_a = true,
          .M = N,
          .N = K,
          .K = M,
          .dtype = d_y.dtype,
          .a = d_y.data,
          .lda = row_stride(d_y),
          .b = args.x.data,
          .ldb = row_stride(args.x),
          .beta = 1.0f,
          .c = args.d_weight.data,
          .ldc = K});
  }
  if (!args.d_bias.empty()) bias_backward(ctx, args.d_y, args.d_bias);
}

}  // namespace mamba3::cuda
