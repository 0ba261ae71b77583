#include "ops/increment.h"

#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

TEST(Increment, AddsToEveryCounter) {
  Context ctx = make_context();
  const Tensor counters = Tensor::of_ids({0, 7, -1});
  increment(ctx, {.counters = counters, .by = 3});
  EXPECT_EQ(counters.values(), (std::vector<double>{3, 10, 2}));
}

TEST(Increment, CountsBeyond32Bits) {
  Context ctx = make_context();
  const Tensor counters = Tensor::of({2}, std::vector<double>{0x7fffffff, -2}, DType::i64);
  increment(ctx, {.counters = counters, .by = 3});
  EXPECT_EQ(counters.values(), (std::vector<double>{2147483650., 1}));
}

TEST(Increment, WantsIntegers) {
  Context ctx = make_context();
  const Tensor floats = Tensor::zeros({2});
  EXPECT_EQ(input_error_of([&] { increment(ctx, {.counters = floats}); }),
            "[increment] dtype of counters: got f32, want i32 or i64");
}

}  // namespace
}  // namespace mamba3::testing
