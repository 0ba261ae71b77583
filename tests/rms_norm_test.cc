#include "ops/rms_norm.h"

#include <cmath>

#include "ref/rms_norm.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

constexpr double kEps = 1e-5;

struct Shape {
  int64_t M, D;
};

class RmsNorm : public ::testing::TestWithParam<Shape> {};

INSTANTIATE_TEST_SUITE_P(Shapes, RmsNorm,
                         ::testing::Values(Shape{1, 1}, Shape{1, 7}, Shape{1, 768}, Shape{3, 48},
                                           Shape{130, 24}, Shape{603, 64}, Shape{70, 65},
                                           Shape{5, 1537}, Shape{3, 2048}),
                         [](const auto& row) {
                           return fmt::format("M{}_D{}", row.param.M, row.param.D);
                         });

TEST_P(RmsNorm, EqualsTheReference) {
  const auto [M, D] = GetParam();
  Random random(1);
  Context ctx = make_context(2);
  const Tensor residual = Tensor::normal(random, {M, D}, 3, DType::f32, 2);
  const Tensor weight = Tensor::normal(random, {D});
  const auto want = ref::rms_norm(residual.values(), {}, weight.values(), kEps);
  const auto run = [&, M = M, D = D](DType dtype) {
    const Tensor out({M, D}, dtype, 3), rstd({M});
    rms_norm(ctx, {.residual = residual,
                   .delta = {},
                   .weight = weight,
                   .residual_out = {},
                   .out = out,
                   .rstd = rstd});
    EXPECT_TRUE(near(out, {M, D}, want, rounded_to(dtype)));
    const double ratio = out.at(0) / (residual.at(0) * weight.at(0));
    EXPECT_NEAR(rstd.at(0) / ratio, 1, unit_of(dtype));
  };
  for (const DType dtype : test_dtypes()) for_each_instruction_set([&] { run(dtype); });
}

void adds_the_delta_first(int64_t M, int64_t D, DType dtype) {
  Random random(2);
  Context ctx = make_context(2);
  const Tensor residual = Tensor::normal(random, {M, D}, 1, DType::f32, 1);
  const Tensor delta = Tensor::normal(random, {M, D}, 2, dtype);
  const Tensor weight = Tensor::normal(random, {D});
  const auto want = ref::rms_norm(residual.values(), delta.values(), weight.values(), kEps);
  auto sum = residual.values();
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += delta.at(static_cast<int64_t>(i));
  for_each_instruction_set([&] {
    const Tensor out({M, D}, dtype), residual_out({M, D}, DType::f32, 1),
        in_place = residual.copy();
    rms_norm(ctx, {.residual = residual,
                   .delta = delta,
                   .weight = weight,
                   .residual_out = residual_out,
                   .out = out,
                   .rstd = {}});
    EXPECT_TRUE(near(out, want, rounded_to(dtype)));
    EXPECT_TRUE(near(residual_out, sum, {.unit = 1e-7}));
    const Tensor out_in_place({M, D}, dtype);
    rms_norm(ctx, {.residual = in_place,
                   .delta = delta,
                   .weight = weight,
                   .residual_out = in_place,
                   .out = out_in_place,
                   .rstd = {}});
    EXPECT_TRUE(same_bits(out_in_place, out));
    EXPECT_TRUE(same_bits(in_place, residual_out));
  });
}

TEST_P(RmsNorm, AddsTheDeltaFirst) {
  for (const DType dtype : test_dtypes()) adds_the_delta_first(GetParam().M, GetParam().D, dtype);
}

// Rows without gaps, so that threads of the GPU keep them in registers: as many as one, two and
// four packs a thread take of few rows, and of many; then rows that are too long or do not divide.
TEST(RmsNormDense, EqualsTheReference) {
  for (const auto& [M, D] : std::initializer_list<std::pair<int64_t, int64_t>>{{3, 4},
                                                                               {3, 768},
                                                                               {2, 2048},
                                                                               {3, 4096},
                                                                               {2, 4100},
                                                                               {2, 8192},
                                                                               {2, 8196},
                                                                               {2, 16384},
                                                                               {2, 16392},
                                                                               {3, 2047},
                                                                               {2400, 132},
                                                                               {2400, 516}}) {
    for (const DType dtype : test_dtypes()) {
      SCOPED_TRACE(fmt::format("M {} D {} {}", M, D, name_of(dtype)));
      Random random(5);
      Context ctx = make_context(2);
      const Tensor residual = Tensor::normal(random, {M, D}, 2),
                   weight = Tensor::normal(random, {D});
      const Tensor delta = Tensor::normal(random, {M, D}, 1, dtype);
      const auto all = residual.values();
      auto sum = all;
      const auto more = delta.values();
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += more[i];
      for (const bool with_delta : {false, true}) {
        const auto want = ref::rms_norm(with_delta ? sum : all, {}, weight.values(), kEps);
        const Tensor out({M, D}, dtype), rstd({M}), stream = residual.copy();
        rms_norm(ctx, {.residual = stream,
                       .delta = with_delta ? delta.view() : View{},
                       .weight = weight,
                       .residual_out = with_delta ? stream.view() : View{},
                       .out = out,
                       .rstd = rstd});
        EXPECT_TRUE(near(out, want, rounded_to(dtype)));
        EXPECT_TRUE(near(stream, with_delta ? sum : all, {.unit = 1e-7}));
        std::vector<double> scales;
        for (int64_t m = 0; m < M; ++m) {
          double squares = 0;
          for (int64_t i = m * D; i < (m + 1) * D; ++i) {
            const double x = (with_delta ? sum : all)[static_cast<size_t>(i)];
            squares += x * x;
          }
          scales.push_back(1 / std::sqrt(squares / static_cast<double>(D) + kEps));
        }
        EXPECT_TRUE(near(rstd, scales, {.unit = 1e-6}));
      }
    }
  }
}

// So a forward that is done again from the sum gives the same bits.
TEST_P(RmsNorm, DoesNotDependOnWhereTheSumIsFormed) {
  const auto [M, D] = GetParam();
  Random random(6);
  Context ctx = make_context(2);
  const Tensor residual = Tensor::normal(random, {M, D}), weight = Tensor::normal(random, {D});
  for (const DType dtype : test_dtypes()) {
    const Tensor delta = Tensor::normal(random, {M, D}, 1, dtype);
    for_each_instruction_set([&, M = M, D = D] {
      const Tensor sum({M, D}), out({M, D}, dtype), rstd({M}), again({M, D}, dtype),
          rstd_again({M});
      rms_norm(ctx, {.residual = residual,
                     .delta = delta,
                     .weight = weight,
                     .residual_out = sum,
                     .out = out,
                     .rstd = rstd});
      rms_norm(ctx, {.residual = sum, .weight = weight, .out = again, .rstd = rstd_again});
      EXPECT_TRUE(same_bits(again, out));
      EXPECT_TRUE(same_bits(rstd_again, rstd));
    });
  }
}

void backward_is_the_gradient(int64_t M, int64_t D, DType dtype) {
  Random random(3);
  Context ctx = make_context(2);
  const Tensor residual = Tensor::normal(random, {M, D}, 1, DType::f32, 1);
  const Tensor weight = Tensor::normal(random, {D});
  const Tensor d_out = Tensor::normal(random, {M, D}, 1, dtype, 2);
  const Tensor arriving = Tensor::normal(random, {M, D}), earlier = Tensor::normal(random, {D});
  const auto of_residual = [&](const std::vector<Complex>& x) {
    return dot(d_out.values(), ref::rms_norm(x, {}, to_complex(weight.values()), kEps)) +
           dot(arriving.values(), x);
  };
  const auto of_weight = [&](const std::vector<Complex>& w) {
    return dot(d_out.values(), ref::rms_norm(to_complex(residual.values()), {}, w, kEps)) +
           dot(earlier.values(), w);
  };
  const auto positions = some_positions(random, M * D, std::min<int64_t>(M * D, 60));
  const auto want_residual = complex_step(of_residual, residual.values(), positions);
  const auto columns = some_positions(random, D, std::min<int64_t>(D, 60));
  const auto want_weight = complex_step(of_weight, weight.values(), columns);
  for_each_instruction_set([&] {
    const Tensor out({M, D}), rstd({M}), d_weight = earlier.copy();
    const Tensor d_residual = Tensor::of({M, D}, arriving.values(), DType::f32, 3);
    rms_norm(ctx, {.residual = residual,
                   .delta = {},
                   .weight = weight,
                   .residual_out = {},
                   .out = out,
                   .rstd = rstd});
    rms_norm_backward(ctx, {.residual = residual,
                            .weight = weight,
                            .rstd = rstd,
                            .d_out = d_out,
                            .d_residual = d_residual,
                            .d_weight = d_weight});
    EXPECT_TRUE(near(gather(d_residual, positions), want_residual, {.unit = 2e-6}));
    EXPECT_TRUE(near(gather(d_weight, columns), want_weight, {.terms = static_cast<double>(M)}));
  });
}

TEST_P(RmsNorm, BackwardIsTheGradient) {
  for (const DType dtype : test_dtypes())
    backward_is_the_gradient(GetParam().M, GetParam().D, dtype);
}

// The copy is the total in another type, and changes nothing else.
TEST_P(RmsNorm, BackwardCopiesTheTotal) {
  const auto [M, D] = GetParam();
  Random random(7);
  Context ctx = make_context(2);
  const Tensor residual = Tensor::normal(random, {M, D}), weight = Tensor::normal(random, {D});
  const Tensor rstd = Tensor::normal(random, {M}), arriving = Tensor::normal(random, {M, D});
  for (const DType of_d_out : test_dtypes()) {
    const Tensor d_out = Tensor::normal(random, {M, D}, 1, of_d_out);
    struct Results {
      Tensor d_residual, d_weight;
    };
    const auto run = [&, D = D](const View& copy) {
      Results r{arriving.copy(), Tensor::zeros({D})};
      rms_norm_backward(ctx, {.residual = residual,
                              .weight = weight,
                              .rstd = rstd,
                              .d_out = d_out,
                              .d_residual = r.d_residual,
                              .d_residual_copy = copy,
                              .d_weight = r.d_weight});
      return r;
    };
    for (const DType dtype : test_dtypes()) {
      for (const int64_t row_gap : {0, 2, 3}) {
        for_each_instruction_set([&, M = M, D = D] {
          const Results without = run({});
          const Tensor copy({M, D}, dtype, row_gap);
          const Results with = run(copy);
          EXPECT_TRUE(same_bits(copy, Tensor::of({M, D}, with.d_residual.values(), dtype)));
          EXPECT_TRUE(near(with.d_residual, without.d_residual.values(), {.unit = 4e-6}));
          EXPECT_TRUE(near(with.d_weight, without.d_weight.values(),
                           {.unit = 4e-6, .terms = static_cast<double>(M)}));
          if (row_gap > 0) return;  // other packs, and so other sums
          EXPECT_TRUE(same_bits(with.d_residual, without.d_residual));
          EXPECT_TRUE(same_bits(with.d_weight, without.d_weight));
        });
      }
    }
  }
}

TEST(RmsNormThreads, DoNotChangeABit) {
  Random random(4);
  constexpr int64_t M = 300, D = 131;
  const Tensor residual = Tensor::normal(random, {M, D}), delta = Tensor::normal(random, {M, D});
  const Tensor weight = Tensor::normal(random, {D}), d_out = Tensor::normal(random, {M, D});
  struct Results {
    Tensor out{M, D}, residual{M, D}, rstd{M}, d_residual = Tensor::zeros({M, D}),
                                               d_weight = Tensor::zeros({D});
  };
  const auto run = [&](int threads) {
    Context ctx = make_context(threads);
    Results r;
    rms_norm(ctx, {.residual = residual,
                   .delta = delta,
                   .weight = weight,
                   .residual_out = r.residual,
                   .out = r.out,
                   .rstd = r.rstd});
    rms_norm_backward(ctx, {.residual = r.residual,
                            .weight = weight,
                            .rstd = r.rstd,
                            .d_out = d_out,
                            .d_residual = r.d_residual,
                            .d_weight = r.d_weight});
    return r;
  };
  const Results one = run(1);
  for (const int threads : {2, 3}) {
    const Results many = run(threads);
    EXPECT_TRUE(same_bits(many.out, one.out));
    EXPECT_TRUE(same_bits(many.residual, one.residual));
    EXPECT_TRUE(same_bits(many.rstd, one.rstd));
    EXPECT_TRUE(same_bits(many.d_residual, one.d_residual));
    EXPECT_TRUE(same_bits(many.d_weight, one.d_weight));
  }
}

class RmsNormErrors : public ::testing::Test {
 protected:
  Context ctx = make_context(1);
  Tensor residual = Tensor::zeros({2, 5}), delta = Tensor::zeros({2, 5}),
         weight = Tensor::zeros({5}), other = Tensor::zeros({2, 5}), out{2, 5}, rstd{2},
         seven = Tensor::zeros({7}), wide = Tensor::zeros({2, 7}), three = Tensor::zeros({3});
  RmsNormArgs args{.residual = residual,
                   .delta = delta,
                   .weight = weight,
                   .residual_out = other,
                   .out = out,
                   .rstd = rstd};
  std::string forward() {
    return input_error_of([&] { rms_norm(ctx, args); });
  }
};

TEST_F(RmsNormErrors, OfTheForwardNameTheArgument) {
  const RmsNormArgs good = args;
  const auto with = [&](View RmsNormArgs::*member, const View& view) {
    args = good;
    args.*member = view;
    return forward();
  };
  EXPECT_EQ(forward(), "nothing thrown");
  EXPECT_EQ(with(&RmsNormArgs::residual, {}), "[rms_norm] residual is missing");
  EXPECT_EQ(with(&RmsNormArgs::weight, seven), "[rms_norm] dim 0 of weight: got 7, want 5");
  EXPECT_EQ(with(&RmsNormArgs::out, wide), "[rms_norm] dim 1 of out: got 7, want 5");
  EXPECT_EQ(with(&RmsNormArgs::out, residual), "[rms_norm] out and residual must not share memory");
  EXPECT_EQ(with(&RmsNormArgs::delta, {}), "[rms_norm] residual_out is only written with a delta");
  EXPECT_EQ(with(&RmsNormArgs::delta, wide), "[rms_norm] dim 1 of delta: got 7, want 5");
  EXPECT_EQ(with(&RmsNormArgs::residual_out, {}), "[rms_norm] residual_out is missing");
  EXPECT_EQ(with(&RmsNormArgs::residual_out, delta),
            "[rms_norm] residual_out and delta must not share memory");
  EXPECT_EQ(with(&RmsNormArgs::out, delta), "[rms_norm] out and delta must not share memory");
  EXPECT_EQ(with(&RmsNormArgs::out, other),
            "[rms_norm] out and residual_out must not share memory");
  View shifted = residual;
  shifted.data = residual.view().as<float>() + 1;
  EXPECT_EQ(with(&RmsNormArgs::residual_out, shifted),
            "[rms_norm] residual_out and residual must not share memory");
  EXPECT_EQ(with(&RmsNormArgs::rstd, three), "[rms_norm] dim 0 of rstd: got 3, want 2");
}

TEST_F(RmsNormErrors, OfTheBackwardNameTheArgument) {
  const Tensor d_weight = Tensor::zeros({5});
  const RmsNormBackwardArgs good{.residual = residual,
                                 .weight = weight,
                                 .rstd = rstd,
                                 .d_out = delta,
                                 .d_residual = other,
                                 .d_weight = d_weight};
  const auto with = [&](View RmsNormBackwardArgs::*member, const View& view) {
    RmsNormBackwardArgs changed = good;
    changed.*member = view;
    return input_error_of([&] { rms_norm_backward(ctx, changed); });
  };
  using Args = RmsNormBackwardArgs;
  EXPECT_EQ(with(&Args::residual, {}), "[rms_norm_backward] residual is missing");
  EXPECT_EQ(with(&Args::weight, seven), "[rms_norm_backward] dim 0 of weight: got 7, want 5");
  EXPECT_EQ(with(&Args::rstd, three), "[rms_norm_backward] dim 0 of rstd: got 3, want 2");
  EXPECT_EQ(with(&Args::d_out, wide), "[rms_norm_backward] dim 1 of d_out: got 7, want 5");
  EXPECT_EQ(with(&Args::d_residual, wide),
            "[rms_norm_backward] dim 1 of d_residual: got 7, want 5");
  EXPECT_EQ(with(&Args::d_weight, seven), "[rms_norm_backward] dim 0 of d_weight: got 7, want 5");
  EXPECT_EQ(with(&Args::d_residual, residual),
            "[rms_norm_backward] d_residual and residual must not share memory");
  EXPECT_EQ(with(&Args::d_residual, delta),
            "[rms_norm_backward] d_residual and d_out must not share memory");
  EXPECT_EQ(with(&Args::d_residual_copy, out), "nothing thrown");
  EXPECT_EQ(with(&Args::d_residual_copy, wide),
            "[rms_norm_backward] dim 1 of d_residual_copy: got 7, want 5");
  EXPECT_EQ(with(&Args::d_residual_copy, other),
            "[rms_norm_backward] d_residual_copy and d_residual must not share memory");
  EXPECT_EQ(with(&Args::d_residual_copy, residual),
            "[rms_norm_backward] d_residual_copy and residual must not share memory");
  EXPECT_EQ(with(&Args::d_residual_copy, delta),
            "[rms_norm_backward] d_residual_copy and d_out must not share memory");
  EXPECT_EQ(with(&Args::d_weight, weight),
            "[rms_norm_backward] d_weight and weight must not share memory");
}

}  // namespace
}  // namespace mamba3::testing
