#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <optional>

#include "core/error.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/delta_scan.h"
#include "ops/delta_step.h"
#include "ops/embedding.h"
#include "ops/grouped_rms_norm.h"
#include "ops/linear.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/rotary.h"
#include "ops/sample.h"
#include "ops/short_conv.h"
#include "ops/swiglu.h"
#include "ref/adamw.h"
#include "ref/cross_entropy.h"
#include "ref/grouped_rms_norm.h"
#include "ref/linear.h"
#include "ref/rms_norm.h"
#include "ref/rotary.h"
#include "ref/swiglu.h"
#include "support/compare.h"
#include "support/delta.h"
#include "support/device.h"
#include "support/mixer.h"
#include "support/tensor.h"

// Tensors of more than 2^31 elements, on the GPU. All are zero but for a few rows at their two ends
// (or at the end alone), and those at the end lie wholly beyond 2^31 elements. A kernel that forms
// an offset there in 32 bits reads and writes elsewhere: before the tensor, where mostly no memory
// is, or in its zeros or its first rows, which are other random numbers. So it fails, or the last
// rows of its result are zero or differ from what they must be. That is computed from the few rows
// alone: by the reference, or by the same op on a small tensor.

namespace mamba3::testing {
namespace {

constexpr int64_t kBeyond = int64_t{1} << 31;  // elements
constexpr int64_t kRows = 3;                   // that are not zero, at either end

// The GPU's memory holds one of these tests at a time, also if there are several processes.
class Turn {
 public:
  Turn() {
    const auto path = std::filesystem::temp_directory_path() / "mamba3-large-offsets.lock";
    file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file_ >= 0) flock(file_, LOCK_EX);
  }
  ~Turn() {
    if (file_ >= 0) close(file_);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  int file_ = -1;
};

class LargeOffsets : public ::testing::Test {
 protected:
  void SetUp() override {
    if (test_device() == Device::cpu) GTEST_SKIP() << "needs a GPU";
    turn_.emplace();
  }

  // What to say if the GPU does not have that much to spare, else nothing.
  static std::string memory_lacks(double gigabytes) {
    try {
      allocate_bytes(Device::cuda, static_cast<size_t>(gigabytes * 1e9));
    } catch (const Error& error) {
      return error.what();
    }
    return {};
  }

  // Without a copy in host memory, unlike Tensor.
  View zeros(std::initializer_list<int64_t> dims, DType dtype = DType::f32) {
    View view = make_view(nullptr, dtype, dims, Device::cuda);
    memory_.push_back(allocate_zeros(Device::cuda, static_cast<size_t>(view.bytes())));
    view.data = memory_.back().get();
    return view;
  }

  static View first_rows(const View& rows) { return rows.slice(0, 0, kRows); }
  static View last_rows(const View& rows) {
    return rows.slice(0, rows.dim(0) - kRows, rows.dim(0));
  }
  // Both ends of `rows`, from the 2 kRows rows of `ends` and as such.
  void put(const Tensor& ends, const View& rows) {
    copy(ctx_, first_rows(ends), first_rows(rows));
    copy(ctx_, last_rows(ends), last_rows(rows));
  }
  static Tensor ends_of(const View& rows) {
    std::vector<double> values = values_of(first_rows(rows));
    const std::vector<double> last = values_of(last_rows(rows));
    values.insert(values.end(), last.begin(), last.end());
    return Tensor::of({2 * kRows, static_cast<int64_t>(values.size()) / (2 * kRows)}, values);
  }

 private:
  std::optional<Turn> turn_;  // first, so that it ends when all memory has been given back
  std::vector<std::shared_ptr<void>> memory_;

 protected:
  Context ctx_ = make_context(1);
};

double logistic(double x) {
  return 1 / (1 + std::exp(-x));
}

// --- linear: y (M, N) ---

struct LinearShape {
  int64_t M, N, K;
};
constexpr LinearShape kManyOutputs{.M = kBeyond / 65536 + kRows, .N = 65536, .K = 16};

TEST_F(LargeOffsets, OutputsOfALinear) {
  if (const auto why = memory_lacks(5); !why.empty()) GTEST_SKIP() << why;
  const auto [M, N, K] = kManyOutputs;
  Random random(1);
  const Tensor ends = Tensor::normal(random, {2 * kRows, K}, 1, DType::bf16);
  const Tensor weight = Tensor::normal(random, {N, K}, 1, DType::bf16);
  const Tensor bias = Tensor::normal(random, {N});  // written to y by a kernel of ours
  const View x = zeros({M, K}, DType::bf16), y = zeros({M, N}, DType::bf16);
  put(ends, x);
  linear(ctx_, {.x = x, .weight = weight, .bias = bias, .y = y});
  std::vector<double> want(static_cast<size_t>(2 * kRows * N));
  ref::linear(2 * kRows, N, K, ends.values().data(), weight.values().data(), bias.values().data(),
              want.data());
  // Rounded twice: the bias, then the sum.
  EXPECT_TRUE(near(ends_of(y), want, {.unit = 2 * unit_of(DType::bf16)}));
}

TEST_F(LargeOffsets, GradientOfTheOutputsOfALinear) {
  if (const auto why = memory_lacks(14); !why.empty()) GTEST_SKIP() << why;
  const auto [M, N, K] = kManyOutputs;
  Random random(2);
  const Tensor ends_x = Tensor::normal(random, {2 * kRows, K}, 1, DType::bf16);
  const Tensor weight = Tensor::normal(random, {N, K}, 1, DType::bf16);
  // f32, but values that bf16 holds: the op converts all of d_y to the type of the weight.
  const auto d = Tensor::normal(random, {2 * kRows, N}, 1, DType::bf16).values();
  const View x = zeros({M, K}, DType::bf16), d_y = zeros({M, N}), d_x = zeros({M, K}, DType::bf16);
  const View d_weight = zeros({N, K}), d_bias = zeros({N});
  put(ends_x, x);
  put(Tensor::of({2 * kRows, N}, d), d_y);
  linear_backward(
      ctx_,
      {.x = x, .weight = weight, .d_y = d_y, .d_x = d_x, .d_weight = d_weight, .d_bias = d_bias});
  const auto x_values = ends_x.values(), w = weight.values();
  std::vector<double> want_x(x_values.size()), want_weight(w.size());
  std::vector<double> want_bias(static_cast<size_t>(N));
  for (size_t i = 0; i < 2 * kRows; ++i) {
    for (size_t n = 0; n < static_cast<size_t>(N); ++n) {
      const double d_in = d[i * static_cast<size_t>(N) + n];
      want_bias[n] += d_in;
      for (size_t k = 0; k < static_cast<size_t>(K); ++k) {
        want_x[i * static_cast<size_t>(K) + k] += d_in * w[n * static_cast<size_t>(K) + k];
        want_weight[n * static_cast<size_t>(K) + k] +=
            d_in * x_values[i * static_cast<size_t>(K) + k];
      }
    }
  }
  EXPECT_TRUE(near(ends_of(d_x), want_x, rounded_to(DType::bf16)));
  EXPECT_TRUE(near(d_weight, want_weight, {.unit = 4e-6, .terms = 2 * kRows}));
  EXPECT_TRUE(near(d_bias, want_bias, {.terms = 2 * kRows}));
}

// Decoding: few rows of x, a weight of more than 2^31 elements.
TEST_F(LargeOffsets, WeightOfALinearOfFewRows) {
  if (const auto why = memory_lacks(5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t K = 2048, N = kBeyond / K + kRows;
  Random random(3);
  const Tensor x = Tensor::normal(random, {2, K}, 1, DType::bf16);
  const Tensor ends = Tensor::normal(random, {2 * kRows, K}, 1, DType::bf16);
  const View weight = zeros({N, K}, DType::bf16), y = zeros({2, N});
  put(ends, weight);
  linear(ctx_, {.x = x, .weight = weight, .y = y});
  std::vector<double> want(4 * kRows);
  ref::linear<double>(2, 2 * kRows, K, x.values().data(), ends.values().data(), nullptr,
                      want.data());
  for (int64_t m = 0; m < 2; ++m) {
    EXPECT_TRUE(near(ends_of(y.select(0, m)),
                     std::span(want).subspan(static_cast<size_t>(m) * 2 * kRows, 2 * kRows),
                     {.terms = K}));
  }
}

// --- embedding: weight (V, D), out (M, D) ---

TEST_F(LargeOffsets, WeightOfAnEmbedding) {
  if (const auto why = memory_lacks(13.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t D = 2048, V = kBeyond / D + kRows;
  Random random(4);
  const Tensor ends = Tensor::normal(random, {2 * kRows, D}, 1, DType::bf16);
  const Tensor ids = Tensor::of_ids({static_cast<int32_t>(V - 1), 0, static_cast<int32_t>(V - 3),
                                     static_cast<int32_t>(V - 1), 2});
  const int64_t rows[] = {5, 0, 3, 5, 2};  // of the ends
  const View weight = zeros({V, D}, DType::bf16);
  const Tensor out({5, D});
  put(ends, weight);
  embedding(ctx_, {.ids = ids, .weight = weight, .out = out});
  const Tensor d_out = Tensor::normal(random, {5, D});
  const View d_weight = zeros({V, D});
  embedding_backward(ctx_, {.ids = ids, .d_out = d_out, .d_weight = d_weight});
  const auto weights = ends.values(), d = d_out.values();
  std::vector<double> want(5 * D), want_weight(2 * kRows * D);
  for (size_t i = 0; i < 5; ++i) {
    for (size_t n = 0; n < D; ++n) {
      const size_t at = static_cast<size_t>(rows[i]) * D + n;
      want[i * D + n] = weights[at];
      want_weight[at] += d[i * D + n];
    }
  }
  EXPECT_TRUE(near(out, want, {.unit = 1e-12}));
  EXPECT_TRUE(near(ends_of(d_weight), want_weight, {}));
}

TEST_F(LargeOffsets, OutputsOfAnEmbedding) {
  if (const auto why = memory_lacks(9.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t D = 2048, M = kBeyond / D + kRows, V = 2 * kRows + 1;
  Random random(5);
  const Tensor weight = Tensor::normal(random, {V, D});
  // 1, 2, 3 at the first places, 4, 5, 6 at the last, 0 between.
  std::vector<double> id(M);
  for (size_t i = 0; i < kRows; ++i) {
    id[i] = static_cast<double>(i + 1);
    id[M - kRows + i] = static_cast<double>(i + 1 + kRows);
  }
  const Tensor ids = Tensor::of({M}, id, DType::i32);
  const View rows = zeros({M, D});
  embedding(ctx_, {.ids = ids, .weight = weight, .out = rows});
  EXPECT_TRUE(near(ends_of(rows), values_of(weight.view().slice(0, 1, V)), {.unit = 1e-12}));

  const Tensor d_ends = Tensor::normal(random, {2 * kRows, D});
  zero(ctx_, rows);
  put(d_ends, rows);
  const Tensor d_weight = Tensor::zeros({V, D});
  embedding_backward(ctx_, {.ids = ids, .d_out = rows, .d_weight = d_weight});
  EXPECT_TRUE(near(d_weight.view().slice(0, 1, V), d_ends.values(), {.unit = 1e-12}));
  EXPECT_TRUE(near(d_weight.view().slice(0, 0, 1), std::vector<double>(D), {}));
}

// --- rms_norm and swiglu: (M, D), (M, 2F) ---

void expect_gradient_of_rms_norm(const Tensor& d_residual, const View& d_weight,
                                 const std::vector<double>& x, const std::vector<double>& weight,
                                 const std::vector<double>& d_out, std::vector<double> arriving,
                                 double eps) {
  const size_t D = weight.size();
  std::vector<double> want_weight(D);
  for (size_t row = 0; row < x.size(); row += D) {
    double squares = 0, along = 0;
    for (size_t i = row; i < row + D; ++i) squares += x[i] * x[i];
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(D) + eps);
    for (size_t i = row; i < row + D; ++i) along += d_out[i] * weight[i - row] * x[i] * rstd;
    along /= static_cast<double>(D);
    for (size_t i = row; i < row + D; ++i) {
      arriving[i] += rstd * (d_out[i] * weight[i - row] - x[i] * rstd * along);
      want_weight[i - row] += d_out[i] * x[i] * rstd;
    }
  }
  EXPECT_TRUE(near(d_residual, arriving, {.unit = 2e-6}));
  EXPECT_TRUE(near(d_weight, want_weight, {.unit = 2e-6, .terms = 2 * kRows}));
}

// Rows that a warp takes, and rows that a block takes.
TEST_F(LargeOffsets, RowsOfAnRmsNorm) {
  if (const auto why = memory_lacks(27); !why.empty()) GTEST_SKIP() << why;
  constexpr double kEps = 1e-5;
  const View residual_memory = zeros({kBeyond + kRows * 2048});
  const View d_residual_memory = zeros({kBeyond + kRows * 2048});
  const View delta_memory = zeros({kBeyond + kRows * 2048}, DType::bf16);
  const View out_memory = zeros({kBeyond + kRows * 2048}, DType::bf16);
  for (const int64_t D : {512, 2048}) {
    SCOPED_TRACE(D);
    const int64_t M = kBeyond / D + kRows;
    const auto rows_in = [&](const View& memory) {
      zero(ctx_, memory);
      return memory.slice(0, 0, M * D).reshape({M, D});
    };
    const View residual = rows_in(residual_memory), d_residual = rows_in(d_residual_memory);
    const View delta = rows_in(delta_memory), out = rows_in(out_memory);
    Random random(6);
    const Tensor ends = Tensor::normal(random, {2 * kRows, D});
    const Tensor ends_delta = Tensor::normal(random, {2 * kRows, D}, 2, DType::bf16);
    const Tensor weight = Tensor::normal(random, {D}), rstd({M});
    put(ends, residual);
    put(ends_delta, delta);
    rms_norm(ctx_, {.residual = residual,
                    .delta = delta,
                    .weight = weight,
                    .residual_out = residual,
                    .out = out,
                    .rstd = rstd});
    auto sum = ends.values();
    const auto deltas = ends_delta.values();
    EXPECT_TRUE(near(ends_of(out), ref::rms_norm(sum, deltas, weight.values(), kEps),
                     rounded_to(DType::bf16)));
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += deltas[i];
    EXPECT_TRUE(near(ends_of(residual), sum, {.unit = 1e-7}));

    const Tensor d_out = Tensor::normal(random, {2 * kRows, D}, 1, DType::bf16);
    const Tensor arriving = Tensor::normal(random, {2 * kRows, D});
    const Tensor d_weight = Tensor::zeros({D});
    put(d_out, delta);  // which is zero elsewhere
    put(arriving, d_residual);
    rms_norm_backward(ctx_, {.residual = residual,
                             .weight = weight,
                             .rstd = rstd,
                             .d_out = delta,
                             .d_residual = d_residual,
                             .d_weight = d_weight});
    expect_gradient_of_rms_norm(ends_of(d_residual), d_weight, sum, weight.values(), d_out.values(),
                                arriving.values(), kEps);
  }
}

// Groups that a warp takes, and groups that a block takes.
TEST_F(LargeOffsets, RowsOfAGroupedRmsNorm) {
  if (const auto why = memory_lacks(9); !why.empty()) GTEST_SKIP() << why;
  const View x_memory = zeros({kBeyond + kRows * 4096}, DType::bf16);
  const View d_memory = zeros({kBeyond + kRows * 4096}, DType::bf16);
  for (const int64_t C : {512, 4096}) {
    SCOPED_TRACE(C);
    constexpr int64_t groups = 4;
    const int64_t M = kBeyond / C + kRows;
    const auto rows_in = [&](const View& memory) {
      zero(ctx_, memory);
      return memory.slice(0, 0, M * C).reshape({M, C});
    };
    const View x = rows_in(x_memory), d = rows_in(d_memory);
    Random random(8);
    const Tensor ends = Tensor::normal(random, {2 * kRows, C}, 1, DType::bf16);
    const Tensor d_ends = Tensor::normal(random, {2 * kRows, C}, 1, DType::bf16);
    const Tensor weight = Tensor::normal(random, {C});
    const auto backward = [&](const View& of_x, const View& of_d) {
      Tensor d_weight = Tensor::zeros({C});
      grouped_rms_norm_backward(ctx_, {.groups = groups,
                                       .x = of_x,
                                       .weight = weight,
                                       .d_out = of_d,
                                       .d_x = of_d,
                                       .d_weight = d_weight});
      return d_weight;
    };
    put(ends, x);
    put(d_ends, d);
    const Tensor d_weight = backward(x, d), d_small = d_ends.copy();
    const Tensor d_weight_small = backward(ends, d_small);
    EXPECT_TRUE(near(ends_of(d), d_small.values(), rounded_to(DType::bf16)));
    EXPECT_TRUE(near(d_weight, d_weight_small.values(), {.unit = 2e-6, .terms = 2 * kRows}));

    grouped_rms_norm(ctx_, {.groups = groups, .x = x, .weight = weight, .out = x});
    EXPECT_TRUE(near(ends_of(x),
                     ref::grouped_rms_norm(ends.values(), weight.values(), groups, 1e-5),
                     rounded_to(DType::bf16)));
  }
}

// y_gate has more than 2^32 elements: an unsigned offset of 32 bits would meet the first rows.
TEST_F(LargeOffsets, RowsOfASwiglu) {
  if (const auto why = memory_lacks(13.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t F = 4096, M = kBeyond / F + kRows;
  Random random(7);
  const Tensor ends = Tensor::normal(random, {2 * kRows, 2 * F}, 1, DType::bf16);
  const Tensor d_ends = Tensor::normal(random, {2 * kRows, F}, 1, DType::bf16);
  const View y_gate = zeros({M, 2 * F}, DType::bf16), out = zeros({M, F}, DType::bf16);
  put(ends, y_gate);
  swiglu(ctx_, {.y_gate = y_gate, .out = out});
  const auto in = ends.values(), d = d_ends.values();
  EXPECT_TRUE(near(ends_of(out), ref::swiglu(in, F), rounded_to(DType::bf16)));

  put(d_ends, out);
  swiglu_backward(ctx_, {.y_gate = y_gate, .d_out = out, .d_y_gate = y_gate});
  std::vector<double> want(in.size());
  for (size_t row = 0; row < 2 * kRows; ++row) {
    for (size_t i = 0; i < F; ++i) {
      const size_t y = row * 2 * F + i, gate = y + F;
      const double s = logistic(in[gate]);
      want[y] = d[row * F + i] * in[gate] * s;
      want[gate] = d[row * F + i] * in[y] * s * (1 + in[gate] * (1 - s));
    }
  }
  EXPECT_TRUE(near(ends_of(y_gate), want, rounded_to(DType::bf16)));
}

// --- short_conv and rotary: tokens (T, X) of one sequence ---

// Its ends are two sequences that start from zero, since all before the last tokens is zero.
TEST_F(LargeOffsets, TokensOfAShortConv) {
  if (const auto why = memory_lacks(14); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t X = 4096, W = 4, T = kBeyond / X + kRows;
  Random random(8);
  const Tensor ends = Tensor::normal(random, {2 * kRows, X}, 1, DType::bf16);
  const Tensor d_ends = Tensor::normal(random, {2 * kRows, X}, 1, DType::bf16);
  const Tensor weight = Tensor::normal(random, {X, W});
  const View in = zeros({1, T, X}, DType::bf16), out = zeros({1, T, X}, DType::bf16);
  const View few = ends.view().reshape({2, kRows, X});
  const Tensor few_out({2, kRows, X}, DType::bf16), few_d_in({2, kRows, X}, DType::bf16);
  put(ends, in.select(0, 0));
  short_conv(ctx_, {.in = in, .weight = weight, .out = out});
  short_conv(ctx_, {.in = few, .weight = weight, .out = few_out});
  EXPECT_TRUE(near(ends_of(out.select(0, 0)), values_of(few_out), {.unit = 1e-12}));

  zero(ctx_, out);
  put(d_ends, out.select(0, 0));
  const View d_in = zeros({1, T, X}, DType::bf16);
  const Tensor d_weight = Tensor::zeros({X, W}), few_d_weight = Tensor::zeros({X, W});
  short_conv_backward(
      ctx_, {.in = in, .weight = weight, .d_out = out, .d_in = d_in, .d_weight = d_weight});
  short_conv_backward(ctx_, {.in = few,
                             .weight = weight,
                             .d_out = d_ends.view().reshape({2, kRows, X}),
                             .d_in = few_d_in,
                             .d_weight = few_d_weight});
  EXPECT_TRUE(near(ends_of(d_in.select(0, 0)), values_of(few_d_in), {.unit = 1e-12}));
  EXPECT_TRUE(near(d_weight, values_of(few_d_weight), {.terms = 2 * kRows}));
}

TEST_F(LargeOffsets, TokensOfARotary) {
  if (const auto why = memory_lacks(4.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t X = 4096, d = 64, T = kBeyond / X + kRows;
  Random random(9);
  const Tensor ends = Tensor::normal(random, {2 * kRows, X}, 1, DType::bf16);
  const View x = zeros({1, T, X}, DType::bf16);
  put(ends, x.select(0, 0));
  rotary(ctx_, {.x = x, .d = d, .dims = d});
  const auto last = ref::rotary(values_of(last_rows(ends)), X, d, d, 10000, T - kRows);
  auto want = ref::rotary(values_of(first_rows(ends)), X, d, d, 10000);
  want.insert(want.end(), last.begin(), last.end());
  EXPECT_TRUE(near(ends_of(x.select(0, 0)), want, rounded_to(DType::bf16)));
}

// --- cross_entropy: hidden (M, D), weight (V, D), M V logits ---

// The gradients of scale * sum(nll) from rows of hidden and weight.
struct GradientsOfCrossEntropy {
  std::vector<double> nll, d_hidden, d_weight;

  // `others`: so many more rows of the weight, all zero.
  GradientsOfCrossEntropy(const std::vector<double>& hidden, const std::vector<double>& weight,
                          const std::vector<int64_t>& targets, size_t D, double scale,
                          double others = 0)
      : d_hidden(hidden.size()), d_weight(weight.size()) {
    const size_t V = weight.size() / D;
    std::vector<double> logits(V);
    for (size_t m = 0; m < targets.size(); ++m) {
      double sum = others;
      for (size_t v = 0; v < V; ++v) {
        logits[v] = 0;
        for (size_t k = 0; k < D; ++k) logits[v] += hidden[m * D + k] * weight[v * D + k];
        sum += std::exp(logits[v]);
      }
      const auto target = static_cast<size_t>(targets[m]);
      nll.push_back(std::log(sum) - (target < V ? logits[target] : 0.0));
      for (size_t v = 0; v < V; ++v) {
        const double g = scale * (std::exp(logits[v]) / sum - (v == target ? 1.0 : 0.0));
        for (size_t k = 0; k < D; ++k) {
          d_hidden[m * D + k] += g * weight[v * D + k];
          d_weight[v * D + k] += g * hidden[m * D + k];
        }
      }
    }
  }
};

TEST_F(LargeOffsets, TokensOfACrossEntropy) {
  if (const auto why = memory_lacks(11); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t D = 2048, M = kBeyond / D + kRows, V = 2112, vocab = 2100;
  static_assert(M * vocab > kBeyond);
  constexpr double kScale = 0.5;
  Random random(8);
  const Tensor ends = Tensor::normal(random, {2 * kRows, D}, 1, DType::bf16);
  const Tensor weight = Tensor::normal(random, {V, D}, 0.04, DType::bf16);
  const std::vector<int64_t> scored = {7, 0, vocab - 1, 99, vocab - 1, 1234};
  std::vector<double> target(M, -1);
  for (size_t i = 0; i < kRows; ++i) {
    target[i] = static_cast<double>(scored[i]);
    target[M - kRows + i] = static_cast<double>(scored[kRows + i]);
  }
  const Tensor targets = Tensor::of({M}, target, DType::i32), nll({M});
  const Tensor d_weight = Tensor::zeros({V, D}), scale = Tensor::of({1}, std::vector{kScale});
  const View hidden = zeros({M, D}, DType::bf16), d_hidden = zeros({M, D}, DType::bf16);
  put(ends, hidden);
  cross_entropy(ctx_, {.hidden = hidden,
                       .weight = weight,
                       .targets = targets,
                       .vocab = vocab,
                       .nll = nll,
                       .lse = {},
                       .d_hidden = d_hidden,
                       .d_weight = d_weight,
                       .scale = scale});
  const auto rows = values_of(weight.view().slice(0, 0, vocab));
  const GradientsOfCrossEntropy want(ends.values(), rows, scored, D, kScale);
  const Tolerance bound{.unit = 2 * unit_of(DType::bf16)};  // g is bf16, then the result
  EXPECT_TRUE(near(ends_of(nll), want.nll, {.unit = 4e-6, .terms = D}));
  EXPECT_TRUE(near(ends_of(d_hidden), want.d_hidden, bound));
  // Row by row, because those of targets are a thousand times larger.
  for (const int64_t v : {0, 7, 99, 1000, 1234, 2098, 2099}) {
    const auto row = std::span(want.d_weight).subspan(static_cast<size_t>(v) * D, D);
    EXPECT_TRUE(near(d_weight.view().select(0, v), row, bound)) << "row " << v;
  }
}

TEST_F(LargeOffsets, VocabularyOfACrossEntropy) {
  if (const auto why = memory_lacks(13.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t D = 2048, V = kBeyond / D + kRows, M = 6;
  Random random(9);
  const Tensor hidden = Tensor::normal(random, {M, D}, 1, DType::bf16);
  const Tensor ends = Tensor::normal(random, {2 * kRows, D}, 0.1, DType::bf16);
  const View weight = zeros({V, D}, DType::bf16), d_weight = zeros({V, D});
  put(ends, weight);
  const std::vector<int64_t> scored = {5, 1, 3, 0, 4, 5};  // rows of the ends
  std::vector<double> target;
  for (const int64_t row : scored) {
    target.push_back(static_cast<double>(row < kRows ? row : V - 2 * kRows + row));
  }
  const Tensor targets = Tensor::of({M}, target, DType::i32), nll({M});
  const Tensor d_hidden({M, D}, DType::bf16);
  cross_entropy(ctx_, {.hidden = hidden,
                       .weight = weight,
                       .targets = targets,
                       .vocab = V,
                       .nll = nll,
                       .lse = {},
                       .d_hidden = d_hidden,
                       .d_weight = d_weight});
  const GradientsOfCrossEntropy want(hidden.values(), ends.values(), scored, D, 1,
                                     static_cast<double>(V - 2 * kRows));
  const Tolerance bound{.unit = 2 * unit_of(DType::bf16)};
  EXPECT_TRUE(near(nll, want.nll, {.unit = 4e-6, .terms = D}));
  EXPECT_TRUE(near(d_hidden, want.d_hidden, bound));
  EXPECT_TRUE(near(ends_of(d_weight), want.d_weight, bound));
}

// --- adamw ---

TEST_F(LargeOffsets, ATensorOfAdamw) {
  if (const auto why = memory_lacks(39.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t kSize = kBeyond + kRows;
  Random random(10);
  const Tensor param = Tensor::normal(random, {2 * kRows}),
               grad = Tensor::normal(random, {2 * kRows});
  const Tensor m = Tensor::normal(random, {2 * kRows}, 0.1);
  Tensor v = Tensor::normal(random, {2 * kRows}, 0.1);
  for (int64_t i = 0; i < 2 * kRows; ++i) v.set(i, v.at(i) * v.at(i));
  const AdamwTensor tensor{.param = zeros({kSize}),
                           .grad = zeros({kSize}),
                           .m = zeros({kSize}),
                           .v = zeros({kSize}),
                           .low = zeros({kSize}, DType::bf16)};
  put(param, tensor.param), put(grad, tensor.grad), put(m, tensor.m), put(v, tensor.v);
  const Tensor norm({1});
  const AdamwArgs args{
      .tensors = {&tensor, 1}, .lr = 0.01f, .clip = 0.5f, .step = 3, .grad_norm = norm};
  adamw(ctx_, args);
  std::vector<ref::AdamwTensor<double>> want{
      {param.values(), grad.values(), m.values(), v.values(), true}};
  const double want_norm = ref::global_norm(want);
  ref::adamw(args, want);
  EXPECT_NEAR(norm.at(0), want_norm, 1e-6 * want_norm);
  EXPECT_TRUE(near(ends_of(tensor.param), want[0].param, {}));
  EXPECT_TRUE(near(ends_of(tensor.m), want[0].m, {}));
  EXPECT_TRUE(near(ends_of(tensor.v), want[0].v, {}));
  EXPECT_TRUE(near(ends_of(tensor.low), want[0].param, rounded_to(DType::bf16)));
}

// --- mixer: proj (B, T, d_proj), y (B, T, H P), states (rows, ...) ---

constexpr MixerShape kMixer{.H = 8, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};

Tolerance rounded_scan() {
  return {.unit = 2 * unit_of(DType::bf16)};
}

// Zero tokens leave a state of zero behind, so the tokens at the end give what they give alone; 256
// of them lie before the 2^31st element of y, and start a chunk. Chunks of the implementation's
// choice and others, which are left to other kernels.
TEST_F(LargeOffsets, TokensOfAScan) {
  if (const auto why = memory_lacks(34); !why.empty()) GTEST_SKIP() << why;
  constexpr MixerShape s = kMixer;
  constexpr int64_t kTail = 256 + 100, T = kBeyond / s.d_inner() + 100;
  Random random(11);
  const MixerParamTensors params(random, s);
  const Tensor tail = Tensor::normal(random, {1, kTail, s.d_proj()}, 1, DType::bf16);
  const Tensor tail_d_y = Tensor::normal(random, {1, kTail, s.d_inner()}, 1, DType::bf16);
  const View proj = zeros({1, T, s.d_proj()}, DType::bf16);
  const View d_proj = zeros({1, T, s.d_proj()}, DType::bf16);
  const View y = zeros({1, T, s.d_inner()}, DType::bf16);
  const View d_y = zeros({1, T, s.d_inner()}, DType::bf16);
  const auto end_of = [&](const View& view) { return view.slice(1, T - kTail, T); };
  copy(ctx_, tail, end_of(proj));
  copy(ctx_, tail_d_y, end_of(d_y));
  for (const int64_t chunk : {0, 32}) {
    SCOPED_TRACE(chunk);
    zero(ctx_, y), zero(ctx_, d_proj);
    const MixerStateTensors state(random, s, 1, 0), tail_state(random, s, 1, 0);  // zero
    MixerScanArgs args{.shape = s,
                       .params = params.views(s),
                       .proj = proj,
                       .y = y,
                       .state = state.views(),
                       .chunk = chunk};
    mixer_scan(ctx_, args);
    const Tensor tail_y({1, kTail, s.d_inner()}, DType::bf16);
    args.proj = tail, args.y = tail_y, args.state = tail_state.views();
    mixer_scan(ctx_, args);
    EXPECT_TRUE(near(end_of(y), tail_y.values(), rounded_scan()));
    EXPECT_TRUE(near(state.ssm, tail_state.ssm.values(), {.unit = 1e-3}));
    EXPECT_TRUE(near(state.k_prev, tail_state.k_prev.values(), {.unit = 1e-3}));
    EXPECT_TRUE(near(state.v_prev, tail_state.v_prev.values(), {}));

    const MixerParamTensors d_params(s), tail_d_params(s);
    MixerScanBackwardArgs backward{.shape = s,
                                   .params = params.views(s),
                                   .proj = proj,
                                   .d_y = d_y,
                                   .d_proj = d_proj,
                                   .d_params = d_params.views(s),
                                   .chunk = chunk,
                                   .heads = 4};  // as many of the few chunks of the tail
    mixer_scan_backward(ctx_, backward);
    const Tensor tail_d_proj({1, kTail, s.d_proj()}, DType::bf16);
    backward.proj = tail, backward.d_y = tail_d_y, backward.d_proj = tail_d_proj;
    backward.d_params = tail_d_params.views(s);
    mixer_scan_backward(ctx_, backward);
    EXPECT_TRUE(near(end_of(d_proj), tail_d_proj.values(), rounded_scan()));
    EXPECT_TRUE(near(d_params.B_norm, tail_d_params.B_norm.values(), {.unit = 1e-3}));
    EXPECT_TRUE(near(d_params.C_bias, tail_d_params.C_bias.values(), {.unit = 1e-3}));
    EXPECT_TRUE(near(d_params.D, tail_d_params.D.values(), {.unit = 1e-3}));
  }
}

// Two sequences, the second one 2^31 elements behind the first in every tensor.
TEST_F(LargeOffsets, SequencesOfAScan) {
  if (const auto why = memory_lacks(14); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t T = 131;
  MixerShape odd{.H = 3, .P = 24, .N = 16, .G = 1, .R = 3, .S = 4};
  odd.mimo = true;
  odd.rope_pairs = RopePairs::halves;
  const View memory[] = {zeros({kBeyond + T * kMixer.d_proj()}, DType::bf16),
                         zeros({kBeyond + T * kMixer.d_proj()}, DType::bf16),
                         zeros({kBeyond + T * kMixer.d_inner()}, DType::bf16)};
  for (const MixerShape& s : {kMixer, odd}) {
    SCOPED_TRACE(s.P);
    Random random(12);
    const auto apart = [&](const View& in, int64_t columns) {
      View view = in;
      view.rank = 3;
      view.dims = {2, T, columns};
      view.strides = {kBeyond, columns, 1};
      return view;
    };
    const auto put_both = [&](const Tensor& from, const View& to) {
      for (const int64_t b : {0, 1}) copy(ctx_, from.view().select(0, b), to.select(0, b));
    };
    const auto expect_both = [&](const View& got, const Tensor& want) {
      for (const int64_t b : {0, 1}) {
        EXPECT_TRUE(near(got.select(0, b), values_of(want.view().select(0, b)), rounded_scan()))
            << "sequence " << b;
      }
    };
    const MixerParamTensors params(random, s);
    const Tensor proj = Tensor::normal(random, {2, T, s.d_proj()}, 1, DType::bf16);
    const Tensor d_y = Tensor::normal(random, {2, T, s.d_inner()}, 1, DType::bf16);
    const Tensor y({2, T, s.d_inner()}, DType::bf16), d_proj({2, T, s.d_proj()}, DType::bf16);
    const View proj_apart = apart(memory[0], s.d_proj()),
               d_proj_apart = apart(memory[1], s.d_proj());
    const View y_apart = apart(memory[2], s.d_inner());
    put_both(proj, proj_apart);
    MixerScanArgs args{.shape = s, .params = params.views(s), .proj = proj_apart, .y = y_apart};
    mixer_scan(ctx_, args);
    args.proj = proj, args.y = y;
    mixer_scan(ctx_, args);
    expect_both(y_apart, y);

    put_both(d_y, y_apart);
    const MixerParamTensors d_params(s);
    MixerScanBackwardArgs backward{.shape = s,
                                   .params = params.views(s),
                                   .proj = proj_apart,
                                   .d_y = y_apart,
                                   .d_proj = d_proj_apart,
                                   .d_params = d_params.views(s)};
    mixer_scan_backward(ctx_, backward);
    backward.proj = proj, backward.d_y = d_y, backward.d_proj = d_proj;
    mixer_scan_backward(ctx_, backward);
    expect_both(d_proj_apart, d_proj);
  }
}

// A pool of states for tens of thousands of sequences; a step and a scan use its ends.
TEST_F(LargeOffsets, PoolOfStates) {
  if (const auto why = memory_lacks(9.5); !why.empty()) GTEST_SKIP() << why;
  constexpr MixerShape s = kMixer;
  constexpr int64_t kPool = kBeyond / (s.H * s.P * s.N) + 1, kLast = kPool - 1, T = 5;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    Random random(13);
    const MixerParamTensors params(random, s);
    const MixerStateTensors small(random, s, 2, 1, dtype);
    const View ssm = zeros({kPool, s.H, s.P, s.N}, dtype), angle = zeros({kPool, s.H, s.S});
    const View k_prev = zeros({kPool, s.R, s.H, s.N}), v_prev = zeros({kPool, s.H, s.P});
    const Tensor rows = Tensor::of_ids({static_cast<int32_t>(kLast), 0});
    ASSERT_EQ(small.rows.at(0), 1);  // the same sequences in two rows
    const std::pair<View, View> pairs[] = {
        {small.ssm, ssm}, {small.angle, angle}, {small.k_prev, k_prev}, {small.v_prev, v_prev}};
    for (const auto& [from, to] : pairs) {
      copy(ctx_, from.select(0, 0), to.select(0, 0));
      copy(ctx_, from.select(0, 1), to.select(0, kLast));
    }
    const MixerState large{
        .angle = angle, .ssm = ssm, .k_prev = k_prev, .v_prev = v_prev, .rows = rows};
    const Tensor proj = Tensor::normal(random, {2, T, s.d_proj()}, 1, DType::bf16);
    const Tensor y({2, T, s.d_inner()}, DType::bf16), want({2, T, s.d_inner()}, DType::bf16);
    const auto run = [&](const MixerState& state, const View& out) {
      mixer_step(ctx_, {.shape = s,
                        .params = params.views(s),
                        .proj = proj.view().select(1, 0),
                        .y = out.select(1, 0),
                        .state = state});
      mixer_scan(ctx_, {.shape = s,
                        .params = params.views(s),
                        .proj = proj.view().slice(1, 1, T),
                        .y = out.slice(1, 1, T),
                        .state = state});
    };
    run(large, y);
    run(small.views(), want);
    EXPECT_TRUE(same_bits(y, want));
    for (const auto& [from, to] : pairs) {
      EXPECT_TRUE(same_bits(to.select(0, 0), from.select(0, 0)));
      EXPECT_TRUE(same_bits(to.select(0, kLast), from.select(0, 1)));
    }
  }
}

// --- delta: proj (B, T, d_proj), y (B, T, H V), states (rows, ...) ---

constexpr DeltaShape kDelta{.H = 2, .K = 64, .V = 64};

// Two sequences that lie 2^31 elements apart.
TEST_F(LargeOffsets, SequencesOfADeltaScan) {
  if (const auto why = memory_lacks(14); !why.empty()) GTEST_SKIP() << why;
  constexpr DeltaShape s = kDelta;
  constexpr int64_t T = 40;
  Random random(16);
  const auto apart = [&](int64_t columns) {
    View view = zeros({kBeyond + T * columns}, DType::bf16);
    view.rank = 3;
    view.dims = {2, T, columns};
    view.strides = {kBeyond, columns, 1};
    return view;
  };
  const auto put_both = [&](const Tensor& from, const View& to) {
    for (const int64_t b : {0, 1}) copy(ctx_, from.view().select(0, b), to.select(0, b));
  };
  const View proj_apart = apart(s.d_proj()), d_proj_apart = apart(s.d_proj());
  const View y_apart = apart(s.d_inner());
  const DeltaParamTensors params(random, s), d_params(s);
  const Tensor proj = Tensor::normal(random, {2, T, s.d_proj()}, 1, DType::bf16);
  const Tensor d_y = Tensor::normal(random, {2, T, s.d_inner()}, 1, DType::bf16);
  const Tensor y({2, T, s.d_inner()}, DType::bf16), d_proj({2, T, s.d_proj()}, DType::bf16);
  put_both(proj, proj_apart);
  DeltaScanArgs args{.shape = s, .params = params.views(), .proj = proj_apart, .y = y_apart};
  delta_scan(ctx_, args);
  args.proj = proj, args.y = y;
  delta_scan(ctx_, args);
  for (const int64_t b : {0, 1}) {
    EXPECT_TRUE(same_bits(y_apart.select(0, b), y.view().select(0, b))) << "sequence " << b;
  }

  put_both(d_y, y_apart);
  DeltaScanBackwardArgs backward{.shape = s,
                                 .params = params.views(),
                                 .proj = proj_apart,
                                 .d_y = y_apart,
                                 .d_proj = d_proj_apart,
                                 .d_params = d_params.views()};
  delta_scan_backward(ctx_, backward);
  backward.proj = proj, backward.d_y = d_y, backward.d_proj = d_proj;
  delta_scan_backward(ctx_, backward);
  for (const int64_t b : {0, 1}) {
    EXPECT_TRUE(same_bits(d_proj_apart.select(0, b), d_proj.view().select(0, b)))
        << "sequence " << b;
  }
}

TEST_F(LargeOffsets, PoolOfDeltaStates) {
  if (const auto why = memory_lacks(9.5); !why.empty()) GTEST_SKIP() << why;
  constexpr DeltaShape s = kDelta;
  constexpr int64_t kPool = kBeyond / (s.H * s.V * s.K) + 1, kLast = kPool - 1, T = 5;
  Random random(17);
  const DeltaParamTensors params(random, s);
  const DeltaStateTensors small(random, s, 2);
  const View delta = zeros({kPool, s.H, s.V, s.K});
  const Tensor rows = Tensor::of_ids({static_cast<int32_t>(kLast), 0});
  copy(ctx_, small.row(0), delta.select(0, kLast));
  copy(ctx_, small.row(1), delta.select(0, 0));
  const Tensor proj = Tensor::normal(random, {2, T, s.d_proj()}, 1, DType::bf16);
  const Tensor y({2, T, s.d_inner()}, DType::bf16), want({2, T, s.d_inner()}, DType::bf16);
  const auto run = [&](const DeltaState& state, const View& out) {
    delta_step(ctx_, {.shape = s,
                      .params = params.views(),
                      .proj = proj.view().select(1, 0),
                      .y = out.select(1, 0),
                      .state = state});
    delta_scan(ctx_, {.shape = s,
                      .params = params.views(),
                      .proj = proj.view().slice(1, 1, T),
                      .y = out.slice(1, 1, T),
                      .state = state});
  };
  run({.delta = delta, .rows = rows}, y);
  run(small.views(), want);
  EXPECT_TRUE(same_bits(y, want));
  EXPECT_TRUE(same_bits(delta.select(0, kLast), small.row(0)));
  EXPECT_TRUE(same_bits(delta.select(0, 0), small.row(1)));
}

// --- attention: qkv (B, T, ...), cache (rows, T_max, Hkv, d) ---

TEST_F(LargeOffsets, SequencesOfAnAttention) {
  if (const auto why = memory_lacks(19); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t Hq = 16, Hkv = 1, d = 128, T = 128;
  constexpr int64_t kColumns = (Hq + 2 * Hkv) * d, B = kBeyond / (T * Hq * d) + 1;
  Random random(14);
  const View qkv = zeros({B, T, kColumns}, DType::bf16),
             d_qkv = zeros({B, T, kColumns}, DType::bf16);
  const View y = zeros({B, T, Hq * d}, DType::bf16), d_y = zeros({B, T, Hq * d}, DType::bf16);
  const View lse = zeros({B, Hq, T});
  struct Sequence {
    Tensor qkv, d_y, y{{1, T, Hq*d}, DType::bf16}, lse{{1, Hq, T}};
    Tensor d_qkv{{1, T, kColumns}, DType::bf16};
  };
  const auto random_sequence = [&] {
    return Sequence{Tensor::normal(random, {1, T, kColumns}, 1, DType::bf16),
                    Tensor::normal(random, {1, T, Hq * d}, 1, DType::bf16)};
  };
  const Sequence first = random_sequence(), last = random_sequence();
  const auto run = [&](const View& qkv_in, const View& y_out, const View& lse_out,
                       const View& d_y_in, const View& d_qkv_out) {
    attention(ctx_, {.Hq = Hq, .Hkv = Hkv, .d = d, .qkv = qkv_in, .y = y_out, .lse = lse_out});
    attention_backward(ctx_, {.Hq = Hq,
                              .Hkv = Hkv,
                              .d = d,
                              .qkv = qkv_in,
                              .y = y_out,
                              .lse = lse_out,
                              .d_y = d_y_in,
                              .d_qkv = d_qkv_out});
  };
  for (const auto& [sequence, b] : {std::pair{&first, int64_t{0}}, std::pair{&last, B - 1}}) {
    copy(ctx_, sequence->qkv, qkv.slice(0, b, b + 1));
    copy(ctx_, sequence->d_y, d_y.slice(0, b, b + 1));
    run(sequence->qkv, sequence->y, sequence->lse, sequence->d_y, sequence->d_qkv);
  }
  run(qkv, y, lse, d_y, d_qkv);
  for (const auto& [sequence, b] : {std::pair{&first, int64_t{0}}, std::pair{&last, B - 1}}) {
    const Tolerance bound = rounded_to(DType::bf16);
    EXPECT_TRUE(near(y.slice(0, b, b + 1), sequence->y.values(), bound)) << b;
    EXPECT_TRUE(near(lse.slice(0, b, b + 1), sequence->lse.values(), {.unit = 4e-6})) << b;
    EXPECT_TRUE(near(d_qkv.slice(0, b, b + 1), sequence->d_qkv.values(), bound)) << b;
  }
}

// Queries that look for keys at the end of a cache of two million tokens: all others are zero, and
// so are their scores, against more than 20 of a key that is found.
TEST_F(LargeOffsets, TokensOfACache) {
  if (const auto why = memory_lacks(9); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t Hq = 16, Hkv = 8, d = 128, kColumns = (Hq + 2 * Hkv) * d, kKnown = 20;
  constexpr int64_t kZeros = kBeyond / (Hkv * d), kNew = 3;
  Random random(15);
  const Tensor keys = Tensor::normal(random, {1, kKnown, Hkv, d}, 1, DType::bf16);
  const Tensor values = Tensor::normal(random, {1, kKnown, Hkv, d}, 1, DType::bf16);
  Tensor qkv = Tensor::normal(random, {1, kNew, kColumns}, 1, DType::bf16);
  for (int64_t t = 0; t < kNew; ++t) {
    for (int64_t i = 0; i < Hq * d; ++i) {
      const int64_t key_head = i / d / (Hq / Hkv);
      qkv.set(t * kColumns + i, 3 * keys.at(((5 + t) * Hkv + key_head) * d + i % d));
    }
  }
  struct Cache {
    View k, v;
    Tensor rows, lengths, y;
  };
  const auto run = [&](int64_t past) {
    const int64_t T = past + kKnown + kNew;
    Cache cache{zeros({1, T, Hkv, d}, DType::bf16), zeros({1, T, Hkv, d}, DType::bf16),
                Tensor::of_ids({0}), Tensor::of_ids({static_cast<int32_t>(past + kKnown)}),
                Tensor({1, kNew, Hq * d}, DType::bf16)};
    copy(ctx_, keys, cache.k.slice(1, past, past + kKnown));
    copy(ctx_, values, cache.v.slice(1, past, past + kKnown));
    AttentionArgs args{.Hq = Hq,
                       .Hkv = Hkv,
                       .d = d,
                       .qkv = qkv.view().slice(1, 0, kNew - 1),
                       .y = cache.y.view().slice(1, 0, kNew - 1),
                       .cache = {cache.k, cache.v, cache.rows, cache.lengths}};
    attention(ctx_, args);
    cache.lengths.set(0, static_cast<double>(T - 1));
    args.qkv = qkv.view().slice(1, kNew - 1, kNew);
    args.y = cache.y.view().slice(1, kNew - 1, kNew);
    attention_step(ctx_, args);
    return cache;
  };
  const Cache small = run(0), large = run(kZeros);
  EXPECT_TRUE(near(large.y, small.y.values(), rounded_to(DType::bf16)));
  const auto end_of = [&](const View& cached) {
    return cached.slice(1, cached.dim(1) - kKnown - kNew, cached.dim(1));
  };
  EXPECT_TRUE(same_bits(end_of(large.k), end_of(small.k)));  // the new ones were appended
  EXPECT_TRUE(same_bits(end_of(large.v), end_of(small.v)));
}

// --- sample: logits (B, V) ---

TEST_F(LargeOffsets, RowsOfASample) {
  if (const auto why = memory_lacks(26.5); !why.empty()) GTEST_SKIP() << why;
  constexpr int64_t V = 131072, B = kBeyond / V + kRows;
  Random random(16);
  const Tensor ends = Tensor::normal(random, {2 * kRows, V});
  const View logits = zeros({B, V});
  put(ends, logits);
  std::vector<double> largest, second, ids(B, -1);
  for (int64_t row = 0; row < 2 * kRows; ++row) {
    std::vector<double> values = values_of(ends.view().select(0, row));
    const auto first = std::max_element(values.begin(), values.end());
    largest.push_back(static_cast<double>(first - values.begin()));
    *first = 0;
    const auto next = std::max_element(values.begin(), values.end());
    second.push_back(static_cast<double>(next - values.begin()));
    ids[static_cast<size_t>(row < kRows ? row : B - 2 * kRows + row)] = largest.back();
  }
  const Tensor out({B}, DType::i32);
  SampleArgs args{.logits = logits, .vocab = V, .out = out, .temperature = 0};
  sample(ctx_, args);
  EXPECT_EQ(ends_of(out).values(), largest);
  // The penalty, which works on a copy of the logits, turns the largest into nearly 0.
  const Tensor history = Tensor::of({B, 1}, ids, DType::i32);
  args.history = history, args.repeat_penalty = 1e9f;
  args.temperature = 1, args.top_k = 1;
  sample(ctx_, args);
  EXPECT_EQ(ends_of(out).values(), second);
}

}  // namespace
}  // namespace mamba3::testing
