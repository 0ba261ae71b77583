#include "ops/add_sum.h"

#include <cmath>

#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

// Multiples of 1/8, so that the sum is exact in any order.
TEST(AddSum, AddsToTheTotal) {
  Context ctx = make_context();
  Random random(1);
  for (const int64_t n : {1, 3, 1000, 1024, 1025, 40001}) {
    const Tensor eighths = Tensor::integers(random, {n}, -1000, 1000);
    Tensor values({n});
    double want = 2.5;
    for (int64_t i = 0; i < n; ++i) {
      values.set(i, eighths.at(i) / 8);
      want += eighths.at(i) / 8;
    }
    const Tensor total = Tensor::of({1}, std::vector{2.5}, DType::f64);
    add_sum(ctx, {.values = values, .total = total});
    EXPECT_EQ(total.at(0), want) << n;
  }
}

TEST(AddSum, IsTakenInDouble) {
  Context ctx = make_context();
  const Tensor values = Tensor::of({3}, std::vector{16777216.0, 1.0, 1.0});
  const Tensor total = Tensor::of({1}, std::vector{0.0}, DType::f64);
  add_sum(ctx, {.values = values, .total = total});
  EXPECT_EQ(total.at(0), 16777218);
}

TEST(AddSum, KeepsWhatIsNotFinite) {
  Context ctx = make_context();
  for (const double bad : {HUGE_VAL, std::nan("")}) {
    Tensor values = Tensor::zeros({3000});
    values.set(2000, bad);
    const Tensor total = Tensor::of({1}, std::vector{1.0}, DType::f64);
    add_sum(ctx, {.values = values, .total = total});
    EXPECT_FALSE(std::isfinite(total.at(0)));
  }
}

TEST(AddSum, NamesTheArgument) {
  Context ctx = make_context();
  const Tensor values = Tensor::zeros({3}), total = Tensor::of({1}, std::vector{0.0}, DType::f64);
  EXPECT_EQ(input_error_of([&] { add_sum(ctx, {.values = {}, .total = total}); }),
            "[add_sum] values is missing");
  EXPECT_EQ(input_error_of([&] { add_sum(ctx, {.values = values, .total = values}); }),
            "[add_sum] dtype of total: got f32, want f64");
}

}  // namespace
}  // namespace mamba3::testing
