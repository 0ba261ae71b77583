#include "ops/linear.h"

#include <gtest/gtest.h>

#include "bench/cases.h"
#include "cpu/convert.h"
#include "ref/linear.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

using bench::LinearCase;
using testing::Complex;
using testing::input_error_of;
using testing::make_context;
using testing::near;
using testing::Random;
using testing::rounded_to;
using testing::Tensor;
using testing::test_device;
using testing::unit_of;

// The dtype of x and y. On the GPU it is that of the weight.
DType activation_of(const LinearCase& c) {
  return test_device() == Device::cpu ? DType::f32 : c.dtype;
}

// On the GPU the dtype of all operands, which then is the only one that varies, or f32.
std::vector<LinearCase> on_this_device(const std::vector<LinearCase>& cases) {
  if (test_device() == Device::cpu) return cases;
  std::vector<LinearCase> out;
  for (LinearCase c : cases) {
    for (const DType dtype : testing::test_dtypes()) {
      c.dtype = dtype;
      out.push_back(c);
    }
  }
  return out;
}

struct Problem {
  LinearCase shape;
  Tensor x, weight, bias, y;

  Problem(Random& random, const LinearCase& c)
      : shape(c),
        x(Tensor::normal(random, {c.M, c.K}, 1, activation_of(c), c.strided ? bench::kRowGap : 0)),
        weight(Tensor::normal(random, {c.N, c.K}, 1, c.dtype)),
        bias(Tensor::normal(random, {c.N})),
        y(c.accumulate ? Tensor::normal(random, {c.M, c.N}, 1, activation_of(c), gap())
                       : Tensor({c.M, c.N}, activation_of(c), gap())) {}

  int64_t gap() const { return shape.strided ? bench::kRowGap : 0; }
  LinearArgs args() const {
    return {.x = x,
            .weight = weight,
            .bias = shape.bias ? bias.view() : View{},
            .y = y,
            .accumulate = shape.accumulate};
  }
  std::vector<double> reference() const {
    std::vector<double> want = y.values();
    const auto bias_values = bias.values();
    ref::linear(shape.M, shape.N, shape.K, x.values().data(), weight.values().data(),
                shape.bias ? bias_values.data() : nullptr, want.data(), shape.accumulate);
    return want;
  }
};

void forward_agrees(const std::vector<LinearCase>& cases) {
  Context ctx = make_context(3);
  for (const LinearCase& c : on_this_device(cases)) {
    SCOPED_TRACE(c.name + ": " + c.shape());
    Random random(11);
    const Problem problem(random, c);
    const std::vector<double> want = problem.reference();
    linear(ctx, problem.args());
    EXPECT_TRUE(near(problem.y, want, rounded_to(activation_of(c), static_cast<double>(c.K))));
  }
}

TEST(Linear, ForwardOfManyRows) {
  forward_agrees(bench::linear_cases({.M = 40, .N = 70, .K = 50}));
}

TEST(Linear, ForwardOfFewRows) {
  testing::for_each_instruction_set([] {
    forward_agrees(bench::linear_decode_cases({.M = 1, .N = 20, .K = 150, .dtype = DType::bf16}));
  });
}

// Long rows of the weight, as warps of the GPU share them: whole turns of one warp and of several,
// with and without a rest, and rows that 16 bytes do not fit; outputs that fill no block.
TEST(Linear, ForwardOfFewRowsOfLongWeights) {
  std::vector<LinearCase> cases;
  int64_t M = 0;
  for (const auto& [N, K] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {301, 768},
           {64, 1536},
           {129, 3072},
           {33, 6144},  // three loads of 1 to 8 warps
           {301, 2048},
           {65, 2056},
           {40, 4096},
           {31, 8200},
           {17, 16384},  // eight loads
           {9, 20488},
           {5, 40000},  // more than one turn
           {33, 1537},
           {8, 6145},
           {1, 16391},  // element by element
           {20001, 64}}) {
    // Each with another number of rows of x, and the smaller ones with all.
    for (int64_t rows = 1; rows <= 4; ++rows) {
      if (N * K > 100000 && rows != M % 4 + 1) continue;
      cases.push_back({.M = rows, .N = N, .K = K, .dtype = DType::bf16});
    }
    cases.push_back(
        {.M = M++ % 4 + 1, .N = N, .K = K, .dtype = DType::bf16, .bias = true, .accumulate = true});
  }
  forward_agrees(cases);
}

// 5 to 128 rows of bf16, as in a decode step of many sequences: widths that tiles divide and not,
// and a K whose rows are not at multiples of 16 bytes.
TEST(Linear, ForwardOfUpTo128Rows) {
  std::vector<LinearCase> cases;
  for (const int64_t M : {5, 7, 8, 16, 33, 128}) {
    for (const auto& [N, K] : std::initializer_list<std::pair<int64_t, int64_t>>{
             {1, 8}, {70, 200}, {301, 584}, {256, 4096}, {1000, 1032}, {34001, 72}, {64, 100}}) {
      const LinearCase c{.M = M, .N = N, .K = K, .dtype = DType::bf16};
      cases.push_back(c);
      if (N > 1000) continue;
      cases.push_back(c);
      cases.back().bias = cases.back().accumulate = true;
    }
  }
  forward_agrees(cases);
}

// Rows that are parts of longer ones, at multiples of 16 bytes or not.
TEST(Linear, ForwardOfUpTo128RowsWithGaps) {
  Context ctx = make_context(2);
  const DType dtype = test_device() == Device::cpu ? DType::f32 : DType::bf16;
  for (const int64_t gap : {3, 8}) {
    for (const int64_t M : {5, 128}) {
      SCOPED_TRACE(fmt::format("gap {}, M {}", gap, M));
      constexpr int64_t N = 140, K = 136;
      Random random(19);
      const Tensor x = Tensor::normal(random, {M, K}, 1, dtype, 8);
      const Tensor weight = Tensor::normal(random, {N, K}, 1, dtype);
      const Tensor wide = Tensor::normal(random, {M, N + gap}, 1, dtype);
      const std::vector<double> before = wide.values(), in = x.values(), w = weight.values();
      linear(ctx, {.x = x, .weight = weight, .y = wide.view().slice(1, 0, N), .accumulate = true});
      std::vector<double> want, gaps;
      for (size_t i = 0; i < before.size(); ++i) {
        (i % (N + gap) < N ? want : gaps).push_back(before[i]);
      }
      ref::linear(M, N, K, in.data(), w.data(), static_cast<const double*>(nullptr), want.data(),
                  true);
      const View y = wide.view();
      EXPECT_TRUE(near(y.slice(1, 0, N), want, rounded_to(dtype, K)));
      EXPECT_TRUE(near(y.slice(1, N, N + gap), gaps, {.unit = 0, .terms = 0}));
    }
  }
}

// A 16-bit weight of more than one tile, so that tiles meet.
TEST(Linear, ForwardOfAWeightOfSeveralTiles) {
  forward_agrees({{.M = 17, .N = 66, .K = 16500, .dtype = DType::bf16}});
}

TEST(Linear, ARowOfABatchIsThatRowAlone) {
  Context ctx = make_context(2);
  for (const int64_t M : {5, 33}) {
    Random random(12);
    const Problem batch(random, {.M = M, .N = 70, .K = 150});
    linear(ctx, batch.args());
    const Tensor alone({1, 70});
    linear(ctx,
           {.x = batch.x.view().slice(0, 3, 4), .weight = batch.weight, .bias = {}, .y = alone});
    EXPECT_TRUE(near(batch.y.view().slice(0, 3, 4), alone.values(), {.terms = 150}));
  }
}

TEST(Linear, SameBitsForAnyNumberOfThreads) {
  for (const int64_t M : {1, 7, 90}) {
    Random random(13);
    const Problem problem(random, {.M = M, .N = 700, .K = 400, .dtype = DType::bf16});
    Context one = make_context(1), three = make_context(3);
    linear(one, problem.args());
    const Tensor first = problem.y.copy();
    linear(three, problem.args());
    EXPECT_TRUE(testing::same_bits(problem.y, first)) << "M " << M;
  }
}

// Gradients of sum(d_y * y) by the complex step, which for a linear op is exact.
struct Gradients {
  std::vector<double> x, weight, bias;

  Gradients(const Problem& p, const Tensor& d_y) {
    const auto x0 = testing::to_complex(p.x.values());
    const auto w0 = testing::to_complex(p.weight.values());
    const auto b0 = testing::to_complex(p.bias.values());
    const std::vector<double> weights = d_y.values();
    const auto loss = [&](const std::vector<Complex>& xs, const std::vector<Complex>& ws,
                          const std::vector<Complex>& bs) {
      std::vector<Complex> y(weights.size());
      ref::linear(p.shape.M, p.shape.N, p.shape.K, xs.data(), ws.data(), bs.data(), y.data());
      return testing::dot<Complex>(weights, y);
    };
    x = testing::complex_step([&](const auto& at) { return loss(at, w0, b0); }, p.x.values());
    weight =
        testing::complex_step([&](const auto& at) { return loss(x0, at, b0); }, p.weight.values());
    bias = testing::complex_step([&](const auto& at) { return loss(x0, w0, at); }, p.bias.values());
  }
};

void add(std::vector<double>& sums, const std::vector<double>& terms) {
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += terms[i];
}

void backward_agrees(const std::vector<LinearCase>& cases, DType d_y_dtype) {
  Context ctx = make_context(2);
  for (const LinearCase& c : on_this_device(cases)) {
    if (c.M * c.N * c.K > 6000) continue;  // the complex step is quadratic
    SCOPED_TRACE(c.name + ": " + c.shape() + ", d_y " + std::string(name_of(d_y_dtype)));
    Random random(14);
    const Problem p(random, c);
    const DType activation = activation_of(c);
    const Tensor d_y = Tensor::normal(random, {c.M, c.N}, 1, d_y_dtype, p.gap());
    Gradients want(p, d_y);
    const Tensor d_x = c.accumulate ? Tensor::normal(random, {c.M, c.K}, 1, activation, p.gap())
                                    : Tensor({c.M, c.K}, activation, p.gap());
    const Tensor d_weight = Tensor::normal(random, {c.N, c.K}), d_bias = p.bias.copy();
    if (c.accumulate) add(want.x, d_x.values());
    add(want.weight, d_weight.values());
    add(want.bias, d_bias.values());
    linear_backward(ctx, {.x = p.x,
                          .weight = p.weight,
                          .d_y = d_y,
                          .d_x = d_x,
                          .d_weight = d_weight,
                          .d_bias = d_bias,
                          .accumulate_d_x = c.accumulate});
    EXPECT_TRUE(near(d_x, want.x, rounded_to(activation, static_cast<double>(c.N))));
    // bf16 products are summed by matrix units, which round less well than f32; an f32 gradient
    // meets bf16 operands as bf16.
    const bool units = activation == DType::bf16, rounds = units && d_y_dtype == DType::f32;
    EXPECT_TRUE(near(d_weight, want.weight,
                     {.unit = rounds  ? unit_of(DType::bf16)
                              : units ? 4e-6
                                      : 1e-6,
                      .terms = static_cast<double>(c.M)}));
    EXPECT_TRUE(near(d_bias, want.bias, {.terms = static_cast<double>(c.M)}));
  }
}

TEST(Linear, BackwardAgreesWithTheComplexStep) {
  for (const DType d_y : testing::test_dtypes())
    backward_agrees(bench::linear_cases({.M = 9, .N = 6, .K = 7}), d_y);
}

// Sizes that the matrix units like, and those that they do not, where the reference need not be a
// complex step: d_x is a product, and so is d_weight.
TEST(Linear, BackwardOfManyRows) {
  Context ctx = make_context(2);
  for (const LinearCase& c :
       on_this_device({{.M = 256, .N = 64, .K = 128}, {.M = 301, .N = 65, .K = 37}})) {
    SCOPED_TRACE(c.shape());
    Random random(18);
    const DType activation = activation_of(c);
    const Problem p(random, c);
    const Tensor d_y = Tensor::normal(random, {c.M, c.N}, 1, activation);
    const Tensor d_x({c.M, c.K}, activation), d_weight = Tensor::zeros({c.N, c.K}),
                                              d_bias = Tensor::zeros({c.N});
    const auto x = p.x.values(), w = p.weight.values(), dy = d_y.values();
    const auto M = static_cast<size_t>(c.M), N = static_cast<size_t>(c.N),
               K = static_cast<size_t>(c.K);
    std::vector<double> want_x(M * K, 0.0), want_weight(N * K, 0.0), want_bias(N, 0.0);
    for (size_t m = 0; m < M; ++m) {
      for (size_t n = 0; n < N; ++n) {
        want_bias[n] += dy[m * N + n];
        for (size_t k = 0; k < K; ++k) {
          want_x[m * K + k] += dy[m * N + n] * w[n * K + k];
          want_weight[n * K + k] += dy[m * N + n] * x[m * K + k];
        }
      }
    }
    linear_backward(ctx, {.x = p.x,
                          .weight = p.weight,
                          .d_y = d_y,
                          .d_x = d_x,
                          .d_weight = d_weight,
                          .d_bias = d_bias});
    const double unit = activation == DType::bf16 ? 4e-6 : 1e-6;
    EXPECT_TRUE(near(d_x, want_x, rounded_to(activation, static_cast<double>(c.N))));
    EXPECT_TRUE(near(d_weight, want_weight, {.unit = unit, .terms = static_cast<double>(c.M)}));
    EXPECT_TRUE(near(d_bias, want_bias, {.terms = static_cast<double>(c.M)}));
  }
}

// d_x is a sum over tiles of the weight.
TEST(Linear, BackwardOfAWeightOfSeveralTiles) {
  Context ctx = make_context(2);
  Random random(15);
  constexpr int64_t M = 3, N = 66, K = 16500;
  const Tensor weight = Tensor::normal(random, {N, K}, 1, DType::bf16);
  const Tensor d_y = Tensor::normal(random, {M, N}), d_x({M, K});
  std::vector<double> want(M * K, 0.0);
  const auto w = weight.values(), dy = d_y.values();
  for (size_t m = 0; m < M; ++m) {
    for (size_t n = 0; n < N; ++n) {
      for (size_t k = 0; k < K; ++k) want[m * K + k] += dy[m * N + n] * w[n * K + k];
    }
  }
  linear_backward(
      ctx, {.x = {}, .weight = weight, .d_y = d_y, .d_x = d_x, .d_weight = {}, .d_bias = {}});
  // On the GPU d_y is rounded to the weight's dtype.
  EXPECT_TRUE(near(
      d_x, want, {.unit = test_device() == Device::cpu ? 1e-6 : unit_of(DType::bf16), .terms = N}));
}

TEST(Linear, BackwardHasTheSameBitsForAnyNumberOfThreads) {
  Random random(16);
  const Problem p(random, {.M = 300, .N = 130, .K = 200});
  const Tensor d_y = Tensor::normal(random, {300, 130});
  std::vector<Tensor> results;
  for (const int threads : {1, 3}) {
    Context ctx = make_context(threads);
    Tensor d_x({300, 200}), d_weight = Tensor::zeros({130, 200}), d_bias = Tensor::zeros({130});
    linear_backward(ctx, {.x = p.x,
                          .weight = p.weight,
                          .d_y = d_y,
                          .d_x = d_x,
                          .d_weight = d_weight,
                          .d_bias = d_bias});
    results.push_back(std::move(d_x));
    results.push_back(std::move(d_weight));
    results.push_back(std::move(d_bias));
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(testing::same_bits(results[i + 3], results[i]));
}

TEST(Linear, SaysWhatIsWrong) {
  Context ctx = make_context(1);
  const Tensor x = Tensor::zeros({2, 3}), weight = Tensor::zeros({4, 3});
  const Tensor bias = Tensor::zeros({4}), y = Tensor::zeros({2, 4});
  const LinearArgs good{.x = x, .weight = weight, .bias = bias, .y = y};
  const auto message = [&](auto change) {
    LinearArgs args = good;
    change(args);
    return input_error_of([&] { linear(ctx, args); });
  };
  EXPECT_EQ(message([](LinearArgs&) {}), "nothing thrown");
  EXPECT_EQ(message([](LinearArgs& a) { a.x = {}; }), "[linear] x is missing");
  EXPECT_EQ(message([](LinearArgs& a) { a.x.dims[1] = 7; }), "[linear] dim 1 of x: got 7, want 3");
  EXPECT_EQ(message([](LinearArgs& a) { a.bias.dims[0] = 7; }),
            "[linear] dim 0 of bias: got 7, want 4");
  EXPECT_EQ(message([](LinearArgs& a) { a.y = a.bias; }), "[linear] rank of y: got 1, want 2");
  EXPECT_EQ(message([](LinearArgs& a) { a.weight.dtype = DType::u8; }),
            test_device() == Device::cpu
                ? "[linear] dtype of weight: got u8, want f32 or bf16 or f16"
                : "[linear] dtype of weight: got u8, want f32 or bf16");
  if (test_device() == Device::cuda) {
    EXPECT_EQ(message([](LinearArgs& a) { a.weight.dtype = DType::bf16; }),
              "[linear] x and weight must have the same dtype");
  }
  EXPECT_EQ(message([](LinearArgs& a) { a.x.strides[0] = 2; }),
            "[linear] rows of x overlap: stride 2, want at least 3");
  EXPECT_EQ(message([&](LinearArgs& a) {
              a.weight = make_view(a.y.data, DType::f32, {4, 3}, test_device());
            }),
            "[linear] y and weight must not share memory");
}

TEST(Linear, BackwardSaysWhatIsWrong) {
  Context ctx = make_context(1);
  const Tensor x = Tensor::zeros({2, 3}), weight = Tensor::zeros({4, 3});
  const Tensor d_y = Tensor::zeros({2, 4}), d_x = Tensor::zeros({2, 3});
  const Tensor d_weight = Tensor::zeros({4, 3}), d_bias = Tensor::zeros({4});
  const LinearBackwardArgs good{
      .x = x, .weight = weight, .d_y = d_y, .d_x = d_x, .d_weight = d_weight, .d_bias = d_bias};
  const auto message = [&](auto change) {
    LinearBackwardArgs args = good;
    change(args);
    return input_error_of([&] { linear_backward(ctx, args); });
  };
  EXPECT_EQ(message([](LinearBackwardArgs&) {}), "nothing thrown");
  EXPECT_EQ(message([](LinearBackwardArgs& a) { a.weight = {}; }),
            "[linear_backward] weight is missing");
  EXPECT_EQ(message([](LinearBackwardArgs& a) { a.x = {}; }), "[linear_backward] x is missing");
  EXPECT_EQ(message([](LinearBackwardArgs& a) { a.d_bias.dims[0] = 5; }),
            "[linear_backward] dim 0 of d_bias: got 5, want 4");
  EXPECT_EQ(message([](LinearBackwardArgs& a) { a.d_x = a.x; }),
            "[linear_backward] d_x and x must not share memory");
}

void fast_conversion_agrees() {
  Random random(17);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const int64_t n : {0, 1, 15, 16, 17, 100}) {
      const Tensor source = Tensor::normal(random, {n + 1}, 100, dtype);
      const Tensor fast({n}), slow({n});
      cpu::to_float_fast(source.host().data, dtype, fast.host().as<float>(), n);
      to_float(source.host().data, dtype, slow.host().as<float>(), n);
      EXPECT_TRUE(testing::same_bits(fast, slow)) << name_of(dtype) << " " << n;
    }
  }
}

TEST(Linear, FastConversionAgreesWithTheSlowOne) {
  testing::for_each_instruction_set(fast_conversion_agrees);
}

}  // namespace
}  // namespace mamba3
