#include "ops/swiglu.h"

#include "ref/swiglu.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

struct Shape {
  int64_t M, F;
};

class Swiglu : public ::testing::TestWithParam<Shape> {};

INSTANTIATE_TEST_SUITE_P(Shapes, Swiglu,
                         ::testing::Values(Shape{1, 1}, Shape{1, 7}, Shape{3, 48}, Shape{5, 70},
                                           Shape{64, 768}),
                         [](const auto& row) {
                           return fmt::format("M{}_F{}", row.param.M, row.param.F);
                         });

TEST_P(Swiglu, EqualsTheReference) {
  const auto [M, F] = GetParam();
  Random random(1);
  Context ctx = make_context(2);
  // Gates to +-20, where silu is its argument, or nothing.
  for (const DType dtype : test_dtypes()) {
    const Tensor y_gate = Tensor::normal(random, {M, 2 * F}, 5, dtype, 3);
    const auto want = ref::swiglu(y_gate.values(), static_cast<size_t>(F));
    for_each_instruction_set([&, M = M, F = F] {
      const Tensor out({M, F}, dtype, 1);
      swiglu(ctx, {.y_gate = y_gate, .out = out});
      EXPECT_TRUE(near(out, {M, F}, want, rounded_to(dtype)));
    });
  }
}

// Rows without gaps, which the GPU takes 16 bytes at a time where their width allows.
TEST(SwigluDense, EqualsTheReference) {
  for (const auto& [M, F] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {3, 8}, {5, 1536}, {2, 2056}, {3, 1532}, {3, 1530}, {7, 33}}) {
    for (const DType dtype : test_dtypes()) {
      SCOPED_TRACE(fmt::format("M {} F {} {}", M, F, name_of(dtype)));
      Random random(4);
      Context ctx = make_context(2);
      const Tensor y_gate = Tensor::normal(random, {M, 2 * F}, 5, dtype), out({M, F}, dtype);
      swiglu(ctx, {.y_gate = y_gate, .out = out});
      EXPECT_TRUE(
          near(out, ref::swiglu(y_gate.values(), static_cast<size_t>(F)), rounded_to(dtype)));
    }
  }
}

void backward_is_the_gradient(int64_t M, int64_t F, DType dtype) {
  Random random(2);
  Context ctx = make_context(2);
  const Tensor y_gate = Tensor::normal(random, {M, 2 * F}, 2, dtype, 3);
  const Tensor d_out = Tensor::normal(random, {M, F}, 1, dtype, 2);
  const auto loss = [&](const std::vector<Complex>& x) {
    return dot(d_out.values(), ref::swiglu(x, static_cast<size_t>(F)));
  };
  const auto positions = some_positions(random, 2 * M * F, std::min<int64_t>(2 * M * F, 60));
  const auto want = complex_step(loss, y_gate.values(), positions);
  for_each_instruction_set([&] {
    const Tensor d_y_gate({M, 2 * F}, dtype, 4);
    swiglu_backward(ctx, {.y_gate = y_gate, .d_out = d_out, .d_y_gate = d_y_gate});
    EXPECT_TRUE(near(gather(d_y_gate, positions), want, rounded_to(dtype)));
    const Tensor in_place = y_gate.copy();
    swiglu_backward(ctx, {.y_gate = in_place, .d_out = d_out, .d_y_gate = in_place});
    EXPECT_TRUE(same_bits(in_place, d_y_gate));
  });
}

TEST_P(Swiglu, BackwardIsTheGradient) {
  for (const DType dtype : test_dtypes())
    backward_is_the_gradient(GetParam().M, GetParam().F, dtype);
}

TEST(SwigluThreads, DoNotChangeABit) {
  Random random(3);
  constexpr int64_t M = 200, F = 301;
  const Tensor y_gate = Tensor::normal(random, {M, 2 * F}), d_out = Tensor::normal(random, {M, F});
  Context one = make_context(1);
  const Tensor out({M, F}), d_y_gate({M, 2 * F});
  swiglu(one, {.y_gate = y_gate, .out = out});
  swiglu_backward(one, {.y_gate = y_gate, .d_out = d_out, .d_y_gate = d_y_gate});
  for (const int threads : {2, 3}) {
    Context ctx = make_context(threads);
    const Tensor out_n({M, F}), d_y_gate_n({M, 2 * F});
    swiglu(ctx, {.y_gate = y_gate, .out = out_n});
    swiglu_backward(ctx, {.y_gate = y_gate, .d_out = d_out, .d_y_gate = d_y_gate_n});
    EXPECT_TRUE(same_bits(out_n, out));
    EXPECT_TRUE(same_bits(d_y_gate_n, d_y_gate));
  }
}

TEST(SwigluNaN, StaysNaN) {
  Context ctx = make_context(1);
  Tensor y_gate = Tensor::zeros({2, 10});
  y_gate.set(7, std::nan(""));
  const Tensor out({2, 5});
  swiglu(ctx, {.y_gate = y_gate, .out = out});
  EXPECT_TRUE(std::isnan(out.at(2)));
  EXPECT_EQ(out.at(3), 0);
}

TEST(SwigluErrors, NameTheArgument) {
  Context ctx = make_context(1);
  const Tensor y_gate = Tensor::zeros({2, 6}), out({2, 3}), narrow({2, 5}), d({2, 6});
  const auto forward = [&](const View& in, const View& result) {
    return input_error_of([&] { swiglu(ctx, {.y_gate = in, .out = result}); });
  };
  EXPECT_EQ(forward({}, out), "[swiglu] y_gate is missing");
  EXPECT_EQ(forward(y_gate, {}), "[swiglu] out is missing");
  EXPECT_EQ(forward(narrow, out), "[swiglu] dim 1 of y_gate: got 5, want 6");
  EXPECT_EQ(forward(y_gate, y_gate.view().slice(1, 0, 3)),
            "[swiglu] out and y_gate must not share memory");
  const auto backward = [&](const View& in, const View& d_out, const View& result) {
    return input_error_of(
        [&] { swiglu_backward(ctx, {.y_gate = in, .d_out = d_out, .d_y_gate = result}); });
  };
  EXPECT_EQ(backward(y_gate, {}, d), "[swiglu_backward] d_out is missing");
  EXPECT_EQ(backward(narrow, out, d), "[swiglu_backward] dim 1 of y_gate: got 5, want 6");
  EXPECT_EQ(backward(y_gate, out, narrow), "[swiglu_backward] dim 1 of d_y_gate: got 5, want 6");
  EXPECT_EQ(backward(y_gate.view().slice(0, 0, 1), out.view().slice(0, 0, 1),
                     make_view(y_gate.view().as<float>() + 1, DType::f32, {1, 6}, test_device())),
            "[swiglu_backward] d_y_gate and y_gate must not share memory");
  EXPECT_EQ(backward(y_gate, d.view().slice(1, 0, 3), d),
            "[swiglu_backward] d_y_gate and d_out must not share memory");
}

}  // namespace
}  // namespace mamba3::testing
