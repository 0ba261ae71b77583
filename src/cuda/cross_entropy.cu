// Schedule. For each slice of tokens: logits = hidden weight^T in f32, in scratch; a block a row
// takes log-sum-exp and nll, and with gradients reads the row again to put
// g = scale (exp(logits - lse) - [v = target]) in its place, in the dtype of hidden and weight;
// then d_hidden = g weight and d_weight += g^T hidden. A bf16 row lies at the start of its f32 row.
// Rows are as wide as the part of the vocabulary that takes part, so padding costs nothing.

#include <algorithm>

#include "cuda/gemm.h"
#include "cuda/pack.cuh"
#include "ops/cross_entropy.h"

namespace mamba3::cuda {

namespace {

// Tokens of a slice at most, and logits (1 GB). With gradients every slice reads and writes all of
// d_weight, which pays from a thousand tokens on.
constexpr int64_t kSliceOfGradients = 2048, kSliceOfLoss = 512, kSliceLogits = int64_t{1} << 28;
constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kPack = 4;  // f32 rows are as wide as a multiple of it

// log(sum_v exp(logits_v)) so far is max + log(sum). A NaN makes sum NaN.
struct Sum {
  float max, sum;
};

__device__ Sum merged(const Sum& a, const Sum& b) {
  const float max = fmaxf(a.max, b.max), shift = max == -INFINITY ? 0.0f : max;
  return {max, a.sum * expf(a.max - shift) + b.sum * expf(b.max - shift)};
}

__device__ Sum warp_merged(Sum sum) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    const Sum other = {__shfl_xor_sync(~0u, sum.max, lane), __shfl_xor_sync(~0u, sum.sum, lane)};
    sum = merged(sum, other);
  }
  return sum;
}

struct Rows {
  float* logits;  // (rows, width)
  int64_t width, vocab;
  const int32_t* targets;
  float* nll;
  float* lse;  // or null
  float scale;
  bool gradients;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_rows(Rows a) {
  __shared__ Sum sums[kWarps];
  const int64_t row = blockIdx.x;
  float* const logits = a.logits + row * a.width;
  const int64_t packed = a.vocab / kPack * kPack;
  Sum sum = {-INFINITY, 0};
  const auto add = [&]<int n>(const float(&x)[n]) {
    float max = sum.max;
#pragma unroll
    for (int j = 0; j < n; ++j) max = fmaxf(max, x[j]);
    const float shift = max == -INFINITY ? 0.0f : max;
    sum.sum *= expf(sum.max - shift);
#pragma unroll
    for (int j = 0; j < n; ++j) sum.sum += expf(x[j] - shift);
    sum.max = max;
  };
#pragma unroll 4
  for (int64_t v = threadIdx.x * kPack; v < packed; v += kThreads * kPack) {
    float x[kPack];
    load(logits + v, x);
    add(x);
  }
  for (int64_t v = packed + threadIdx.x; v < a.vocab; v += kThreads) {
    float x[1];
    load(logits + v, x);
    add(x);
  }
  sum = warp_merged(sum);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  sum = warp_merged(lane < kWarps ? sums[lane] : Sum{-INFINITY, 0});
  const float lse = sum.max + logf(sum.sum);
  const int32_t target = a.targets[row];
  if (threadIdx.x == 0) {
    if (a.lse != nullptr) a.lse[row] = lse;
    const float logit = target >= 0 && target < a.vocab ? logits[target] : nanf("");
    a.nll[row] = target < 0 ? 0.0f : lse - logit;
  }
  if (!a.gradients) return;
  __syncthreads();  // the target's logit was read
  // All threads read a stretch before one of them writes; what is written never reaches beyond the
  // stretches read, because T is not larger than float.
  T* const gradient = reinterpret_cast<T*>(logits);
  const float scale = target < 0 ? 0.0f : a.scale;
  const auto g = [&](float x, int64_t v) {
    const float p = target < 0 ? 0.0f : expf(x - lse);
    return scale * p - (v == target ? scale : 0.0f);
  };
  for (int64_t begin = 0; begin < a.vocab; begin += kThreads * kPack) {
    const int64_t v = begin + threadIdx.x * kPack;
    float x[kPack] = {};
    if (v < packed) {
      load(logits + v, x);
    } else if (v < a.vocab) {
      for (int j = 0; v + j < a.vocab; ++j) x[j] = logits[v + j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[j] = g(x[j], v + j);
    if (v < packed) {
      store(x, gradient + v);
    } else if (v < a.vocab) {
      for (int j = 0; v + j < a.vocab; ++j) gradient[v + j] = from_float<T>(x[j]);
    }
  }
}

class CrossEntropy {
 public:
  CrossEntropy(Context& ctx, const CrossEntropyArgs& args)
      : ctx_(ctx), args_(args), scope_(ctx.scratch) {
    gradients_ = !args.d_hidden.empty() || !args.d_weight.empty();
    width_ = (args.vocab + kWidth - 1) / kWidth * kWidth;
    const int64_t most = gradients_ ? kSliceOfGradients : kSliceOfLoss;
    slice_rows_ = std::min({args.hidden.dim(0), most, std::max<int64_t>(kSliceLogits / width_, 1)});
    logits_ = scope_.take<float>(slice_rows_ * width_).data();
  }

  void run() {
    const int64_t M = args_.hidden.dim(0);
    for (begin_ = 0; begin_ < M; begin_ += slice_rows_) {
      rows_ = std::min(slice_rows_, M - begin_);
      form_logits();
      finish_rows_of_slice();
      if (!args_.d_hidden.empty()) form_d_hidden();
      if (!args_.d_weight.empty()) add_to_d_weight();
    }
  }

 private:
  static constexpr int64_t kWidth = 64;  // rows begin at multiples of 256 bytes
  static constexpr const char* kOp = "cross_entropy";

  int64_t D() const { return args_.hidden.dim(1); }
  DType dtype() const { return args_.weight.dtype; }
  void* slice_of(const View& view) const {
    return static_cast<char*>(view.data) + begin_ * row_stride(view) * size_of(view.dtype);
  }
  // Of the gradient, which lies in the place of the logits, in its own elements.
  int64_t gradient_stride() const { return width_ * size_of(DType::f32) / size_of(dtype()); }

  void form_logits() {
    gemm(ctx_, kOp,
         {.transpose_b = true,
          .M = rows_,
          .N = args_.vocab,
          .K = D(),
          .dtype = dtype(),
          .a = slice_of(args_.hidden),
          .lda = row_stride(args_.hidden),
          .b = args_.weight.data,
          .ldb = D(),
          .c = logits_,
          .ldc = width_});
  }

  void finish_rows_of_slice() {
    const Rows rows{.logits = logits_,
                    .width = width_,
                    .vocab = args_.vocab,
                    .targets = data<int32_t>(args_.targets) + begin_,
                    .nll = data<float>(args_.nll) + begin_,
                    .lse = args_.lse.empty() ? nullptr : data<float>(args_.lse) + begin_,
                    .scale = args_.scale,
                    .gradients = gradients_};
    visit_activation(dtype(), [&]<typename T>() {
      launch(ctx_, kOp, finish_rows<T>, {.blocks = {blocks_for(rows_, 1)}, .threads = {kThreads}},
             rows);
    });
  }

  void form_d_hidden() {
    gemm(ctx_, kOp,
         {.M = rows_,
          .N = D(),
          .K = args_.vocab,
          .dtype = dtype(),
          .a = logits_,
          .lda = gradient_stride(),
          .b = args_.weight.data,
          .ldb = D(),
          .dtype_c = args_.d_hidden.dtype,
          .c = slice_of(args_.d_hidden),
          .ldc = row_stride(args_.d_hidden)});
  }

  void add_to_d_weight() {
    gemm(ctx_, kOp,
         {.transpose_a = true,
          .M = args_.vocab,
          .N = D(),
          .K = rows_,
          .dtype = dtype(),
          .a = logits_,
          .lda = gradient_stride(),
          .b = slice_of(args_.hidden),
          .ldb = row_stride(args_.hidden),
          .beta = 1,
          .c = args_.d_weight.data,
          .ldc = D()});
  }

  Context& ctx_;
  const CrossEntropyArgs& args_;
  ScratchScope scope_;
  bool gradients_ = false;
  int64_t slice_rows_ = 0, width_ = 0;  // logits_ is (slice_rows, width)
  int64_t begin_ = 0, rows_ = 0;        // the slice at hand
  float* logits_ = nullptr;
};

}  // namespace

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  if (args.hidden.dim(0) > 0) CrossEntropy(ctx, args).run();
}

}  // namespace mamba3::cuda
