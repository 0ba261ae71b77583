// Schedule for any shape. For each slice of tokens: logits = hidden weight^T in f32, in scratch; a
// block a row takes log-sum-exp and nll, and with gradients reads the row again to put
// g = scale (exp(logits - lse) - [v = target]) in its place, in the dtype of hidden and weight;
// then d_hidden = g weight and d_weight += g^T hidden. A bf16 row lies at the start of its f32 row.
// Rows are as wide as the part of the vocabulary that takes part, so padding costs nothing.
//
// Schedule for bf16 on Hopper. The passes over the logits would take a third of the time, so there
// are no logits: the product itself (cuda/exp_gemm.cuh) ends in e = exp(logits - r) and the sums of
// its rows, f32, and stores e in bf16; without gradients not even that. This needs a reference r of
// each row before its logits are known, near enough to the largest one that e does not overflow
// (within 80): the larger of the target's logit and the largest of a sample of the vocabulary,
// whose product takes 1% of the time. With s = sum(e): lse = r + log(s). The gradient
// g = f (e - s [v = target]), f = scale / s, is e with one element of a row changed and a factor
// for the row, which moves to the other operand or to the result: d_hidden = f (e weight), d_weight
// += e^T (f hidden). Should a sum be too large nevertheless, or infinite, its block does that row
// again, slowly, with its largest logit as r.

#include <algorithm>

#include "cuda/exp_gemm.cuh"
#include "cuda/gemm.h"
#include "cuda/pack.cuh"
#include "ops/cross_entropy.h"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "cross_entropy";
constexpr int64_t kWidth = 64;  // rows of logits begin at multiples of 256 bytes, of e 128
constexpr int64_t kBytesOfLoss = int64_t{256} << 20;  // of logits that no gradient is made from
constexpr int kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kPack = 4;  // f32 rows are as wide as a multiple of it

// The factor of the gradient, in memory so that a recording can be replayed with another one.
template <typename Arguments>
__device__ float scale_of(const Arguments& a) {
  return a.scale != nullptr ? *a.scale : 1.0f;
}

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
  float* lse;          // or null
  const float* scale;  // or null: 1
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
  const float scale = target < 0 ? 0.0f : scale_of(a);
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

// The same for rows of up to kShortRow logits: a warp each.
constexpr int kShortRow = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_short_rows(Rows a, int64_t rows) {
  constexpr int kEach = kShortRow / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  float* const logits = a.logits + row * a.width;
  float x[kEach];
  Sum sum = {-INFINITY, 0};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int v = lane + j * kWarp;
    x[j] = v < a.vocab ? logits[v] : -INFINITY;
    sum.max = fmaxf(sum.max, x[j]);
  }
  const float shift = sum.max == -INFINITY ? 0.0f : sum.max;
#pragma unroll
  for (int j = 0; j < kEach; ++j) sum.sum += expf(x[j] - shift);
  sum = warp_merged(sum);
  const float lse = sum.max + logf(sum.sum);
  const int32_t target = a.targets[row];
  if (lane == 0) {
    if (a.lse != nullptr) a.lse[row] = lse;
    const float logit = target >= 0 && target < a.vocab ? logits[target] : nanf("");
    a.nll[row] = target < 0 ? 0.0f : lse - logit;
  }
  if (!a.gradients) return;
  __syncwarp();  // the target's logit was read
  T* const gradient = reinterpret_cast<T*>(logits);
  const float scale = target < 0 ? 0.0f : scale_of(a);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int v = lane + j * kWarp;
    const float p = target < 0 ? 0.0f : expf(x[j] - lse);
    if (v < a.vocab) gradient[v] = from_float<T>(scale * p - (v == target ? scale : 0.0f));
  }
}

int64_t width_for(int64_t vocab) {
  return (vocab + kWidth - 1) / kWidth * kWidth;
}

void* row_of(const View& view, int64_t row) {
  return static_cast<char*>(view.data) + row * row_stride(view) * size_of(view.dtype);
}

class WithLogits {
 public:
  WithLogits(Context& ctx, const CrossEntropyArgs& args)
      : ctx_(ctx), args_(args), scope_(ctx.scratch) {
    gradients_ = !args.d_hidden.empty() || !args.d_weight.empty();
    width_ = width_for(args.vocab);
    const int64_t bytes = gradients_ ? args.slice_bytes : std::min(args.slice_bytes, kBytesOfLoss);
    slice_rows_ = cross_entropy_slice(args.hidden.dim(0), width_ * size_of(DType::f32), bytes);
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
  int64_t D() const { return args_.hidden.dim(1); }
  DType dtype() const { return args_.weight.dtype; }
  void* slice_of(const View& view) const { return row_of(view, begin_); }
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
                    .scale = data<float>(args_.scale),
                    .gradients = gradients_};
    visit_activation(dtype(), [&]<typename T>() {
      if (rows.vocab <= kShortRow) {
        launch(ctx_, kOp, finish_short_rows<T>,
               {.blocks = {blocks_for(rows_, kWarps)}, .threads = {kThreads}}, rows, rows_);
      } else {
        launch(ctx_, kOp, finish_rows<T>, {.blocks = {blocks_for(rows_, 1)}, .threads = {kThreads}},
               rows);
      }
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

struct Row {
  float reference;  // r
  float target;     // the target's logit; NaN if there is none
  float factor;     // f
};

// With the bf16 of a matrix eight at a time.
constexpr int kEight = 8, kRowsOfBlock = kWarps;

// A warp's product of two rows of D elements, in every lane.
__device__ float dot(const __nv_bfloat16* a, const __nv_bfloat16* b, int64_t D) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float sum = 0;
  for (int64_t i = lane * kEight; i < D; i += kWarp * kEight) {
    float x[kEight], y[kEight];
    load(a + i, x);
    load(b + i, y);
#pragma unroll
    for (int j = 0; j < kEight; ++j) sum += x[j] * y[j];
  }
  return warp_sum(sum);
}

struct Operands {
  const __nv_bfloat16* hidden;
  int64_t hidden_stride;
  const __nv_bfloat16* weight;
  int64_t rows, D, vocab;
  const int32_t* targets;
};

// A warp a row. maxima (rows, tiles): of the sample.
__global__ void __launch_bounds__(kThreads)
    choose_references(Operands a, const float* maxima, int64_t tiles, Row* rows, float* shift) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
  if (row >= a.rows) return;
  const int32_t target = a.targets[row];
  float reference = -INFINITY, logit = nanf("");
  for (int64_t tile = 0; tile < tiles; ++tile)
    reference = fmaxf(reference, maxima[row * tiles + tile]);
  if (target >= 0 && target < a.vocab) {
    logit = dot(a.hidden + row * a.hidden_stride, a.weight + target * a.D, a.D);
    reference = fmaxf(reference, logit);
  }
  if (threadIdx.x % kWarp != 0) return;
  rows[row] = {.reference = reference, .target = logit, .factor = 0};
  shift[row] = reference * exp_gemm::kLog2e;
}

struct Finish {
  Operands of;
  Row* rows;
  const float* partial;  // (rows, tiles): the sums of e
  int64_t tiles;
  __nv_bfloat16* e;       // (rows, width), or null
  __nv_bfloat16* scaled;  // (rows, D): f hidden; or null
  int64_t width;
  float *nll, *lse;    // lse or null
  const float* scale;  // or null: 1
};

// Beyond this (exp(60)) f could leave the range of bf16.
constexpr float kMostSum = 1.1e26f;

// The row with its largest logit as the reference; sums in every thread.
__device__ void do_again(const Finish& a, int64_t row, float* scratch, float& reference,
                         float& sum) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp,
            lane = static_cast<int>(threadIdx.x) % kWarp;
  const __nv_bfloat16* const hidden = a.of.hidden + row * a.of.hidden_stride;
  float largest = -INFINITY;
  for (int64_t v = warp; v < a.of.vocab; v += kWarps)
    largest = fmaxf(largest, dot(hidden, a.of.weight + v * a.of.D, a.of.D));
  __syncthreads();
  if (lane == 0) scratch[warp] = largest;
  __syncthreads();
  reference = warp_max(lane < kWarps ? scratch[lane] : -INFINITY);
  sum = 0;
  for (int64_t v = warp; v < a.of.vocab; v += kWarps) {
    const float e = expf(dot(hidden, a.of.weight + v * a.of.D, a.of.D) - reference);
    if (lane == 0) {
      sum += e;
      if (a.e != nullptr) a.e[row * a.width + v] = __float2bfloat16_rn(e);
    }
  }
  sum = block_sum(sum, scratch);
}

// A block a row: nll and lse, e at the target, f and f hidden.
__global__ void __launch_bounds__(kThreads) finish_exponentials(Finish a) {
  __shared__ float scratch[kWarps];
  const int64_t row = blockIdx.x;
  const int32_t target = a.of.targets[row];
  float sum = 0;
  for (int64_t tile = threadIdx.x; tile < a.tiles; tile += kThreads)
    sum += a.partial[row * a.tiles + tile];
  sum = block_sum(sum, scratch);
  float reference = a.rows[row].reference;
  const float logit = a.rows[row].target;
  if (sum > kMostSum) do_again(a, row, scratch, reference, sum);
  const float rest = logf(sum);
  if (threadIdx.x == 0) {
    if (a.lse != nullptr) a.lse[row] = reference + rest;
    a.nll[row] = target < 0 ? 0.0f : (reference - logit) + rest;
  }
  if (a.e == nullptr) return;
  const float factor = target < 0 ? 0.0f : scale_of(a) / sum;
  __nv_bfloat16* const e = a.e + row * a.width;
  if (threadIdx.x == 0) {
    a.rows[row].factor = factor;
    if (target >= 0 && target < a.of.vocab)
      e[target] = __float2bfloat16_rn(expf(logit - reference) - sum);
  }
  if (target < 0 && !isfinite(sum)) {  // 0 e would not be 0
    for (int64_t v = threadIdx.x; v < a.of.vocab; v += kThreads) e[v] = __float2bfloat16_rn(0.0f);
  }
  for (int64_t i = threadIdx.x * kEight; i < a.of.D; i += kThreads * kEight) {
    float x[kEight];
    load(a.of.hidden + row * a.of.hidden_stride + i, x);
#pragma unroll
    for (int j = 0; j < kEight; ++j) x[j] = target < 0 ? 0.0f : factor * x[j];
    store(x, a.scaled + row * a.of.D + i);
  }
}

// d_hidden = f product
template <int n, typename T>
__global__ void scale_rows(const Row* rows, const float* product, T* d_hidden, int64_t stride,
                           int64_t M, int64_t D) {
  const int64_t m = row_of_thread(), i = column_of_thread<n>();
  if (m >= M || i >= D) return;
  const float factor = rows[m].factor;
  float x[n];
  load(product + m * D + i, x);
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] *= factor;
  store(x, d_hidden + m * stride + i);
}

class WithExponentials {
 public:
  WithExponentials(Context& ctx, const CrossEntropyArgs& args)
      : ctx_(ctx), args_(args), scope_(ctx.scratch) {}

  // False, and nothing is done, if this schedule does not take the arguments.
  bool run() {
    if (!serves(args_) || !describe_weight()) return false;
    take_memory();
    const int64_t M = args_.hidden.dim(0);
    for (begin_ = 0; begin_ < M; begin_ += slice_rows_) {
      rows_ = std::min(slice_rows_, M - begin_);
      exp_gemm::describe(hidden_, slice_of(args_.hidden), rows_, D(), row_stride(args_.hidden),
                         exp_gemm::kTileM);
      choose_references_of_slice();
      if (gradients_) {
        multiply<exp_gemm::Want::exponentials>(weight_, args_.vocab, partial_);
      } else {
        multiply<exp_gemm::Want::sums>(weight_, args_.vocab, partial_);
      }
      finish();
      if (!args_.d_hidden.empty()) form_d_hidden();
      if (!args_.d_weight.empty()) add_to_d_weight();
    }
    return true;
  }

 private:
  static constexpr int64_t kSample = 512;  // of the vocabulary
  static constexpr int64_t kSliceOfSums = 16384;

  static bool serves(const CrossEntropyArgs& args) {
    // The copy engine wants addresses and strides in multiples of 16 bytes.
    return args.hidden.dtype == DType::bf16 && args.weight.dtype == DType::bf16 &&
           args.weight.dim(1) % kEight == 0 && packs(args.hidden, kEight) &&
           packs(args.weight, kEight) && exp_gemm::available();
  }

  int64_t D() const { return args_.hidden.dim(1); }
  void* slice_of(const View& view) const { return row_of(view, begin_); }

  // The sample is every so-manieth row. The operands of blocks in clusters come in halves.
  bool describe_weight() {
    in_cluster_ = args_.hidden.dim(0) > exp_gemm::kTileM ? 2 : 1;
    sample_rows_ = std::min(kSample, args_.vocab);
    const int box = exp_gemm::kTileN / in_cluster_;
    const void* const weight = args_.weight.data;
    return exp_gemm::describe(weight_, weight, args_.vocab, D(), D(), box) &&
           exp_gemm::describe(sample_, weight, sample_rows_, D(), args_.vocab / sample_rows_ * D(),
                              box);
  }

  void take_memory() {
    const int64_t M = args_.hidden.dim(0);
    gradients_ = !args_.d_hidden.empty() || !args_.d_weight.empty();
    width_ = width_for(args_.vocab);
    const int64_t tiles = exp_gemm::tiles_along(args_.vocab);
    const int64_t bytes = width_ * size_of(DType::bf16) +
                          D() * (size_of(DType::bf16) + size_of(DType::f32)) +
                          tiles * size_of(DType::f32);
    slice_rows_ =
        gradients_ ? cross_entropy_slice(M, bytes, args_.slice_bytes) : std::min(M, kSliceOfSums);
    row_ = scope_.take<Row>(slice_rows_).data();
    shift_ = scope_.take<float>(slice_rows_).data();
    partial_ = scope_.take<float>(slice_rows_ * tiles).data();
    if (!gradients_) return;
    e_ = scope_.take<__nv_bfloat16>(slice_rows_ * width_).data();
    scaled_ = scope_.take<__nv_bfloat16>(slice_rows_ * D()).data();
    if (!args_.d_hidden.empty()) product_ = scope_.take<float>(slice_rows_ * D()).data();
  }

  template <exp_gemm::Want want>
  void multiply(const CUtensorMap& columns, int64_t N, float* partial) {
    const exp_gemm::Args product{.M = rows_,
                                 .N = N,
                                 .K = D(),
                                 .shift = shift_,
                                 .out = e_,
                                 .width = width_,
                                 .partial = partial};
    const Grid grid{
        .blocks = {exp_gemm::blocks(rows_, N, ctx_.stream->multiprocessors, in_cluster_)},
        .threads = {exp_gemm::kThreads},
        .shared_bytes = exp_gemm::kSharedBytes};
    if (in_cluster_ == 2) {
      launch(ctx_, kOp, exp_gemm::run<want, 2>, grid, hidden_, columns, product);
    } else {
      launch(ctx_, kOp, exp_gemm::run<want, 1>, grid, hidden_, columns, product);
    }
  }

  Operands operands() const {
    return {.hidden = static_cast<const __nv_bfloat16*>(slice_of(args_.hidden)),
            .hidden_stride = row_stride(args_.hidden),
            .weight = data<__nv_bfloat16>(args_.weight),
            .rows = rows_,
            .D = D(),
            .vocab = args_.vocab,
            .targets = data<int32_t>(args_.targets) + begin_};
  }

  void choose_references_of_slice() {
    multiply<exp_gemm::Want::maxima>(sample_, sample_rows_, partial_);
    launch(ctx_, kOp, choose_references,
           {.blocks = {blocks_for(rows_, kRowsOfBlock)}, .threads = {kThreads}}, operands(),
           partial_, exp_gemm::tiles_along(sample_rows_), row_, shift_);
  }

  void finish() {
    const Finish arguments{.of = operands(),
                           .rows = row_,
                           .partial = partial_,
                           .tiles = exp_gemm::tiles_along(args_.vocab),
                           .e = e_,
                           .scaled = scaled_,
                           .width = width_,
                           .nll = data<float>(args_.nll) + begin_,
                           .lse = args_.lse.empty() ? nullptr : data<float>(args_.lse) + begin_,
                           .scale = data<float>(args_.scale)};
    launch(ctx_, kOp, finish_exponentials,
           {.blocks = {blocks_for(rows_, 1)}, .threads = {kThreads}}, arguments);
  }

  void form_d_hidden() {
    gemm(ctx_, kOp,
         {.M = rows_,
          .N = D(),
          .K = args_.vocab,
          .dtype = DType::bf16,
          .a = e_,
          .lda = width_,
          .b = args_.weight.data,
          .ldb = D(),
          .c = product_,
          .ldc = D()});
    visit_activation(args_.d_hidden.dtype, [&]<typename T>() {
      visit_packs<kPack>(D(), {args_.d_hidden}, [&]<int n>() {
        launch(ctx_, kOp, scale_rows<n, T>, grid_of_elements(rows_, D(), n), row_, product_,
               static_cast<T*>(slice_of(args_.d_hidden)), row_stride(args_.d_hidden), rows_, D());
      });
    });
  }

  void add_to_d_weight() {
    gemm(ctx_, kOp,
         {.transpose_a = true,
          .M = args_.vocab,
          .N = D(),
          .K = rows_,
          .dtype = DType::bf16,
          .a = e_,
          .lda = width_,
          .b = scaled_,
          .ldb = D(),
          .beta = 1,
          .c = args_.d_weight.data,
          .ldc = D()});
  }

  Context& ctx_;
  const CrossEntropyArgs& args_;
  ScratchScope scope_;
  CUtensorMap hidden_{}, weight_{}, sample_{};
  int in_cluster_ = 1;
  bool gradients_ = false;
  int64_t slice_rows_ = 0, sample_rows_ = 0, width_ = 0;
  int64_t begin_ = 0, rows_ = 0;  // the slice at hand
  Row* row_ = nullptr;
  float *shift_ = nullptr, *partial_ = nullptr, *product_ = nullptr;
  __nv_bfloat16 *e_ = nullptr, *scaled_ = nullptr;
};

}  // namespace

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  if (args.hidden.dim(0) == 0 || WithExponentials(ctx, args).run()) return;
  WithLogits(ctx, args).run();
}

}  // namespace mamba3::cuda
