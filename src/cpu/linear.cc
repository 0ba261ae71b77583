#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/linear.cc"
#include "ops/linear.h"

#include <hwy/foreach_target.h>

#include <algorithm>

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/simd-inl.h"

// Schedule. A few rows of x (decode) are bound by reading the weights: every weight row is read
// once, in its stored type, against all rows of x. Rows follow each other in memory order: one
// stream a thread is what the hardware prefetcher follows at the full rate (several rows of one
// page at once reached a third of it, and prefetching by hand cost a tenth). More rows of x are a
// matrix product; 16-bit weights are widened for it once a call, a tile of rows at a time.

#ifndef MAMBA3_CPU_LINEAR_ONCE  // this file is compiled once for each instruction set
#define MAMBA3_CPU_LINEAR_ONCE
namespace mamba3::cpu {

// y[m, n] (+)= sum_k x[m, k] weight[n, k] + bias[n] for all m and a range of n.
struct FewRows {
  int64_t M = 0, K = 0;
  const float* x = nullptr;
  int64_t x_stride = 0;
  const void* weight = nullptr;
  DType dtype = DType::f32;
  const float* bias = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  bool accumulate = false;
};

}  // namespace mamba3::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

// sums[m] = sum_k x[m, k] weight[k] for kM rows. Eight accumulators, kM rows by 8 / kM stretches of
// k, hide the latency of an addition.
template <int kM, typename Weight>
void dots(const Weight* weight, const float* x, int64_t x_stride, int64_t K, float* sums) {
  constexpr int kStretches = 8 / kM;
  const int64_t lanes = lane_count();
  Vector partial[kStretches][kM];
  for (auto& stretch : partial) {
    for (Vector& sum : stretch) sum = hn::Zero(kLanes);
  }
  int64_t k = 0;
  for (; k + kStretches * lanes <= K; k += kStretches * lanes) {
    for (int i = 0; i < kStretches; ++i) {
      const int64_t at = k + i * lanes;
      const Vector w = load(weight + at);
      for (int m = 0; m < kM; ++m) {
        partial[i][m] = hn::MulAdd(w, load(x + m * x_stride + at), partial[i][m]);
      }
    }
  }
  for_each_vector(K - k, [&](auto access, int64_t rest) HWY_ATTR {
    const int64_t at = k + rest;
    const Vector w = access.load(weight + at);
    for (int m = 0; m < kM; ++m) {
      partial[0][m] = hn::MulAdd(w, access.load(x + m * x_stride + at), partial[0][m]);
    }
  });
  for (int m = 0; m < kM; ++m) {
    for (int half = kStretches / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) partial[i][m] = hn::Add(partial[i][m], partial[i + half][m]);
    }
    sums[m] = sum_of(partial[0][m]);
  }
}

// Output n of the rows of x from m on, kM at a time; returns the first row that is left.
template <int kM, typename Weight>
int64_t row_blocks(const FewRows& a, int64_t n, int64_t m) {
  const Weight* weight = static_cast<const Weight*>(a.weight) + n * a.K;
  const float bias = a.bias ? a.bias[n] : 0.0f;
  for (; m + kM <= a.M; m += kM) {
    float sums[kM];
    dots<kM>(weight, a.x + m * a.x_stride, a.x_stride, a.K, sums);
    for (int64_t i = 0; i < kM; ++i) {
      float& y = a.y[(m + i) * a.y_stride + n];
      y = (a.accumulate ? y : 0.0f) + sums[i] + bias;
    }
  }
  return m;
}

template <typename Weight>
void few_rows_of(const FewRows& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {  // after the first block the weight row is in L1
    int64_t m = row_blocks<8, Weight>(a, n, 0);
    m = row_blocks<4, Weight>(a, n, m);
    m = row_blocks<2, Weight>(a, n, m);
    row_blocks<1, Weight>(a, n, m);
  }
}

void few_rows(const FewRows& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::bf16:
      return few_rows_of<bf16>(a, begin, end);
    case DType::f16:
      return few_rows_of<f16>(a, begin, end);
    default:
      return few_rows_of<float>(a, begin, end);
  }
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace mamba3::cpu {

HWY_EXPORT(few_rows);

namespace {

constexpr int64_t kFewRows = 12;  // above, the matrix product is faster

void add_bias(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.y.dim(0), N = args.y.dim(1), stride = row_stride(args.y);
  const float* const bias = args.bias.as<float>();
  float* const y = args.y.as<float>();
  ctx.threads.parallel_for(M, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      float* const row = y + m * stride;
      for (int64_t n = 0; n < N; ++n) row[n] = (args.accumulate ? row[n] : 0.0f) + bias[n];
    }
  });
}

void linear_few_rows(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.x.dim(0), N = args.weight.dim(0), K = args.weight.dim(1);
  const FewRows few{.M = M,
                    .K = K,
                    .x = args.x.as<float>(),
                    .x_stride = row_stride(args.x),
                    .weight = args.weight.data,
                    .dtype = args.weight.dtype,
                    .bias = args.bias.empty() ? nullptr : args.bias.as<float>(),
                    .y = args.y.as<float>(),
                    .y_stride = row_stride(args.y),
                    .accumulate = args.accumulate};
  constexpr int64_t kBytes = 1 << 17;  // a piece of work: several microseconds of reading
  const int64_t row_bytes = std::max<int64_t>(K * size_of(args.weight.dtype), 1);
  ctx.threads.parallel_for(N, kBytes / row_bytes, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(few_rows)(few, begin, end);
  });
}

// d_bias += the sum of d_y's rows, in the order of the rows.
void bias_backward(Context& ctx, const View& d_y, float* d_bias) {
  const float* const rows = d_y.as<float>();
  ctx.threads.parallel_for(d_y.dim(1), 256, [&](int64_t begin, int64_t end, int) {
    for (int64_t m = 0; m < d_y.dim(0); ++m) {
      const float* const row = rows + m * row_stride(d_y);
      for (int64_t n = begin; n < end; ++n) d_bias[n] += row[n];
    }
  });
}

}  // namespace

void linear(Context& ctx, const LinearArgs& args) {
  const int64_t M = args.x.dim(0), K = args.weight.dim(1);
  if (M <= kFewRows) return linear_few_rows(ctx, args);
  if (!args.bias.empty()) add_bias(ctx, args);
  const bool add = args.accumulate || !args.bias.empty();
  for_f32_tiles(ctx, args.weight, [&](const float* weight, int64_t first, int64_t last) {
    gemm(ctx, {.transpose_b = true,
               .M = M,
               .N = last - first,
               .K = K,
               .a = args.x.as<float>(),
               .lda = row_stride(args.x),
               .b = weight,
               .ldb = K,
               .beta = add ? 1.0f : 0.0f,
               .c = args.y.as<float>() + first,
               .ldc = row_stride(args.y)});
  });
}

void linear_backward(Context& ctx, const LinearBackwardArgs& args) {
  const int64_t M = args.d_y.dim(0), N = args.d_y.dim(1);
  const float* const d_y = args.d_y.as<float>();
  if (!args.d_x.empty()) {
    const int64_t K = args.d_x.dim(1);
    for_f32_tiles(ctx, args.weight, [&](const float* weight, int64_t first, int64_t last) {
      gemm(ctx, {.M = M,
                 .N = K,
                 .K = last - first,
                 .a = d_y + first,
                 .lda = row_stride(args.d_y),
                 .b = weight,
                 .ldb = K,
                 .beta = args.accumulate_d_x || first > 0 ? 1.0f : 0.0f,
                 .c = args.d_x.as<float>(),
                 .ldc = row_stride(args.d_x)});
    });
  }
  if (!args.d_weight.empty()) {
    const int64_t K = args.x.dim(1);
    gemm(ctx, {.transpose_a = true,
               .M = N,
               .N = K,
               .K = M,
               .a = d_y,
               .lda = row_stride(args.d_y),
               .b = args.x.as<float>(),
               .ldb = row_stride(args.x),
               .beta = 1.0f,
               .c = args.d_weight.as<float>(),
               .ldc = K});
  }
  if (!args.d_bias.empty()) bias_backward(ctx, args.d_y, args.d_bias.as<float>());
}

}  // namespace mamba3::cpu

#endif
