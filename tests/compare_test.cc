#include "support/compare.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "gtest/gtest-spi.h"
#include "support/complex_step.h"
#include "support/errors.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

using ::testing::AssertionResult;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool says(const AssertionResult& result, const std::string& part) {
  return !result && std::string(result.message()).find(part) != std::string::npos;
}

class Compare : public ::testing::Test {
 protected:
  Random random{1};
  Tensor got = Tensor::normal(random, {3, 100, 70});
  std::vector<double> want = got.values();
  static int64_t position(int64_t i, int64_t j, int64_t k) { return (i * 100 + j) * 70 + k; }
};

TEST_F(Compare, PassesOnEqualAndOnRounded) {
  EXPECT_TRUE(near(got, {3, 100, 70}, want, {}));
  for (double& value : want) value *= 1 + 2e-7 * random.normal();
  EXPECT_TRUE(near(got, want, {}));
  EXPECT_LT(relative_norm(got, want), 1e-6);
}

TEST_F(Compare, FailsOnAnotherShape) {
  EXPECT_EQ(std::string(near(got, {100, 3, 70}, want, {}).message()),
            "shape: got (3, 100, 70), want (100, 3, 70)");
  EXPECT_EQ(std::string(near(got, {3, 100}, want, {}).message()),
            "shape: got (3, 100, 70), want (3, 100)");
  want.pop_back();
  EXPECT_EQ(std::string(near(got, want, {}).message()),
            "size: got (3, 100, 70) with 21000 elements, want 20999 elements");
  EXPECT_EQ(std::string(near(View{}, want, {}).message()), "got an empty view");
}

TEST_F(Compare, FailsOnNaN) {
  got.set(position(1, 2, 3), kNaN);
  EXPECT_EQ(std::string(near(got, want, {.unit = 1e9}).message()),
            "NaN or infinity differs at 1 of 21000 elements, first at (1, 2, 3): got nan, want " +
                fmt::format("{}", want[static_cast<size_t>(position(1, 2, 3))]));
  EXPECT_EQ(relative_norm(got, want), kInfinity);
}

TEST_F(Compare, FailsOnNaNAndInfinityInTheWrongPlace) {
  want[5] = kNaN;
  EXPECT_TRUE(says(near(got, want, {}), "first at (0, 0, 5)"));
  got.set(5, kNaN);
  EXPECT_TRUE(near(got, want, {}));
  want[7] = kInfinity;
  got.set(7, -kInfinity);
  EXPECT_TRUE(says(near(got, want, {}), "got -inf, want inf"));
  got.set(7, 1);
  EXPECT_TRUE(says(near(got, want, {}), "first at (0, 0, 7)"));
  got.set(7, kInfinity);
  EXPECT_TRUE(near(got, want, {}));
}

TEST_F(Compare, FailsOnAWrongSign) {
  got.set(position(2, 99, 69), -1);
  want[static_cast<size_t>(position(2, 99, 69))] = 1;
  EXPECT_TRUE(says(near(got, want, {.unit = unit_of(DType::bf16), .terms = 1000}),
                   "1 of 21000 elements out of bounds, the worst at (2, 99, 69): got -1, want 1"));
}

TEST_F(Compare, ReportsTheWorst) {
  got.set(position(0, 1, 2), 100);
  got.set(position(1, 1, 1), 1e6);
  EXPECT_TRUE(
      says(near(got, want, {}), "2 of 21000 elements out of bounds, the worst at (1, 1, 1)"));
}

TEST_F(Compare, FailsOnOneWrongTileInALargeTensor) {
  // Each element is inside its bound, which terms = 1e6 makes wide; together they are not.
  const Tolerance tolerance{.terms = 1e6};
  const int64_t begin = 100 * kCompareTile;
  for (int64_t i = begin; i < begin + kCompareTile; ++i) {
    const double value = want[static_cast<size_t>(i)];
    got.set(i, value + 0.8e-3 * (1 + std::abs(value)) * (i % 2 ? 1 : -1));
  }
  EXPECT_TRUE(says(near(got, want, tolerance), "norm of the difference over the tile of 64 from"));
  EXPECT_LT(relative_norm(got, want), 1e-4) << "the whole tensor hides it";
}

TEST_F(Compare, TheBoundGrowsWithTermsAndMagnitude) {
  want[0] = got.at(0) + 3e-5;
  EXPECT_FALSE(near(got, want, {}));
  EXPECT_TRUE(near(got, want, {.terms = 1000}));
  want[0] = 1e4;
  got.set(0, 1e4 + 1e-3);
  EXPECT_TRUE(near(got, want, {}));
}

TEST(CompareSmall, AllZeroMustBeZero) {
  const std::vector<double> zeros(4, 0.0);
  Tensor got = Tensor::zeros({4});
  EXPECT_TRUE(near(got, zeros, {}));
  got.set(2, 1e-30);
  EXPECT_TRUE(says(near(got, zeros, {}), "(2): got 1e-30, want 0"));
}

TEST(CompareSmall, OneElementMayUseItsWholeBound) {
  const Tensor got = Tensor::of({1}, std::vector<double>{1 + 1.9e-6});
  EXPECT_TRUE(near(got, std::vector<double>{1}, {}));
}

TEST(CompareSmall, ReadsStridedViewsAndOtherDtypes) {
  Random random(2);
  const Tensor wide = Tensor::normal(random, {3, 8}, 1, DType::bf16, 5);
  const View part = wide.view().slice(1, 2, 6);
  const std::vector<double> values = values_of(part);
  EXPECT_EQ(values[4], wide.at(8 + 2));
  EXPECT_TRUE(near(part, {3, 4}, values, {}));
}

TEST(SameBits, SeesASingleBit) {
  Random random(3);
  const Tensor a = Tensor::normal(random, {5, 5}, 1, DType::f32, 3);
  Tensor b = Tensor::of({5, 5}, a.values());
  EXPECT_TRUE(same_bits(a, b));
  b.set(7, std::nextafter(static_cast<float>(b.at(7)), 100.0f));
  EXPECT_TRUE(says(same_bits(a, b), "1 of 25 elements differ in bits, first at (1, 2)"));
  EXPECT_FALSE(same_bits(a, b.view().slice(0, 0, 4)));
}

TEST(TensorTest, StartsAsNaNAndKeepsItsCanaries) {
  const Tensor tensor({2, 3}, DType::f32, 1);
  for (const double value : tensor.values()) EXPECT_TRUE(std::isnan(value));
  EXPECT_EQ(Tensor({2}, DType::i32).at(1), -1);
  EXPECT_TRUE(tensor.canaries_alive());
}

TEST(TensorTest, NoticesAWriteOutside) {
  std::optional<Tensor> tensor = Tensor::zeros({2, 3}, DType::f32, 1);
  float* data = tensor->view().as<float>();
  for (const int offset : {-1, 3, 8}) {  // before, between rows, behind
    data[offset] = 0;
    EXPECT_FALSE(tensor->canaries_alive());
    if (offset == 3) {
      EXPECT_TRUE(says(tensor->canaries_alive(), "12 bytes from its first element"));
    }
    std::memset(data + offset, 0xff, sizeof(float));
    EXPECT_TRUE(tensor->canaries_alive());
  }
  data[-1] = 0;
  EXPECT_NONFATAL_FAILURE(tensor.reset(), "a write outside of the tensor (2, 3), -4 bytes");
}

TEST(ComplexStep, IsExact) {
  const auto f = [](const std::vector<Complex>& x) {
    return x[0] * std::exp(x[1]) + ref::silu(x[2]);
  };
  const std::vector<double> x = {2, 0.5, -1.25};
  const std::vector<double> gradient = complex_step(f, x);
  const double s = 1 / (1 + std::exp(1.25));
  EXPECT_NEAR(gradient[0], std::exp(0.5), 1e-15);
  EXPECT_NEAR(gradient[1], 2 * std::exp(0.5), 1e-15);
  EXPECT_NEAR(gradient[2], s + x[2] * s * (1 - s), 1e-15);
  const std::vector<int64_t> positions = {2};
  EXPECT_EQ(complex_step(f, x, positions), std::vector<double>{gradient[2]});
}

TEST(ErrorsTest, TellWhatCame) {
  EXPECT_EQ(input_error_of([] { input_error("bad {}", 1); }), "bad 1");
  EXPECT_EQ(input_error_of([] { error("bad"); }), "not an InputError: bad");
  EXPECT_EQ(input_error_of([] {}), "nothing thrown");
  EXPECT_EQ(error_of([] { error("bad"); }), "bad");
  EXPECT_EQ(error_of([] { input_error("bad"); }), "an InputError: bad");
}

}  // namespace
}  // namespace mamba3::testing
