#include "ops/linear_swiglu.h"

#include <gtest/gtest.h>

#include "ref/linear.h"
#include "ref/swiglu.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/random.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

struct Problem {
  int64_t M, F, K;
  Tensor x, weight, y_gate, out;

  Problem(Random& random, int64_t rows, int64_t width, int64_t inner, DType dtype, int64_t gap)
      : M(rows),
        F(width),
        K(inner),
        x(Tensor::normal(random, {M, K}, 1, activation(dtype), gap)),
        weight(Tensor::normal(random, {2 * F, K}, 0.2, dtype)),
        y_gate({M, 2 * F}, activation(dtype)),
        out({M, F}, activation(dtype), gap) {}

  static DType activation(DType dtype) { return test_device() == Device::cpu ? DType::f32 : dtype; }
  LinearSwigluArgs args(bool keeps) const {
    return {.x = x, .weight = weight, .y_gate = y_gate, .out = out, .keeps = keeps};
  }
  std::vector<double> product() const {
    std::vector<double> want(static_cast<size_t>(M * 2 * F));
    constexpr const double* kNoBias = nullptr;
    ref::linear(M, 2 * F, K, x.values().data(), weight.values().data(), kNoBias, want.data(),
                false);
    return want;
  }
};

void equals_the_reference(int64_t M, int64_t F, int64_t K, DType dtype, int64_t gap) {
  SCOPED_TRACE(fmt::format("M {} F {} K {} {} gap {}", M, F, K, name_of(dtype), gap));
  Random random(31);
  Context ctx = make_context(2);
  const Problem problem(random, M, F, K, dtype, gap);
  const std::vector<double> product = problem.product();
  // Where there is a y_gate, it is rounded too, so out is a product of rounded numbers.
  Tolerance tolerance = rounded_to(problem.out.view().dtype, static_cast<double>(K));
  tolerance.unit *= 2;
  linear_swiglu(ctx, problem.args(/*keeps=*/false));
  EXPECT_TRUE(near(problem.out, ref::swiglu(product, static_cast<size_t>(F)), tolerance));
  linear_swiglu(ctx, problem.args(/*keeps=*/true));
  EXPECT_TRUE(near(problem.out, ref::swiglu(product, static_cast<size_t>(F)), tolerance));
  EXPECT_TRUE(near(problem.y_gate, product, tolerance));
}

// Few rows and many; widths that fill groups of warps, blocks and multiprocessors, and not; a K
// longer than what the warps of a block take at once, and one whose rows are not at multiples of
// 16 bytes.
TEST(LinearSwiglu, EqualsTheReference) {
  for (const auto& [F, K] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {1, 8}, {20, 64}, {301, 72}, {33, 768}, {13, 2056}, {6, 4104}, {5, 8200}, {70, 50}}) {
    for (const int64_t M : {1, 2, 5, 8, 9}) {
      if (K > 1000 && M != 1 && M != 8) continue;
      for (const DType dtype : test_dtypes()) {
        equals_the_reference(M, F, K, dtype, /*gap=*/0);
        equals_the_reference(M, F, K, dtype, /*gap=*/M % 2 == 0 ? 8 : 3);
      }
    }
  }
}

TEST(LinearSwiglu, TheSameBitsInEveryRun) {
  Random random(32);
  Context ctx = make_context(2);
  for (const int64_t M : {1, 5}) {
    for (const DType dtype : test_dtypes()) {
      const Problem problem(random, M, 300, 2048, dtype, 0);
      linear_swiglu(ctx, problem.args(/*keeps=*/false));
      const Tensor first = problem.out.copy();
      linear_swiglu(ctx, problem.args(/*keeps=*/false));
      EXPECT_TRUE(same_bits(problem.out, first));
    }
  }
}

TEST(LinearSwigluErrors, AreThoseOfItsTwoOps) {
  Random random(33);
  Context ctx = make_context(1);
  const Problem problem(random, 2, 6, 8, DType::f32, 0);
  const Tensor half({6, 8}), wide({2, 7});
  for (const bool keeps : {false, true}) {
    const auto with = [&](View LinearSwigluArgs::*member, const View& view) {
      LinearSwigluArgs args = problem.args(keeps);
      args.*member = view;
      return input_error_of([&] { linear_swiglu(ctx, args); });
    };
    EXPECT_EQ(with(&LinearSwigluArgs::weight, half), "[linear] dim 1 of y: got 12, want 6");
    EXPECT_EQ(with(&LinearSwigluArgs::out, wide), "[swiglu] dim 1 of y_gate: got 12, want 14");
    EXPECT_EQ(with(&LinearSwigluArgs::y_gate, {}), "[linear] y is missing");
  }
}

}  // namespace
}  // namespace mamba3::testing
