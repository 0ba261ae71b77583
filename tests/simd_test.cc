// The shared helpers of the kernels, for every instruction set.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/simd_test.cc"
#include "hwy/foreach_target.h"
// foreach_target.h first.
#include "cpu/simd-inl.h"

#ifndef MAMBA3_SIMD_TEST_ONCE  // not once a target
#define MAMBA3_SIMD_TEST_ONCE
namespace mamba3::cpu {
enum class Function { exp, sigmoid, silu, softplus };
}
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void map(Function function, const float* x, float* y, int64_t n) {
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector value = access.load(x + i);
    switch (function) {
      case Function::exp:
        return access.store(exp(value), y + i);
      case Function::sigmoid:
        return access.store(sigmoid(value), y + i);
      case Function::silu:
        return access.store(silu(value), y + i);
      case Function::softplus:
        return access.store(softplus(value), y + i);
    }
  });
}

float dot_any(const float* a, const void* b, DType dtype, int64_t n) {
  if (dtype == DType::bf16) return dot(a, static_cast<const bf16*>(b), n);
  if (dtype == DType::f16) return dot(a, static_cast<const f16*>(b), n);
  return dot(a, static_cast<const float*>(b), n);
}

void convert_any(const void* x, DType dtype, float* out, int64_t n) {
  if (dtype == DType::bf16) return convert(static_cast<const bf16*>(x), out, n);
  if (dtype == DType::f16) return convert(static_cast<const f16*>(x), out, n);
  return convert(static_cast<const float*>(x), out, n);
}

float largest(const float* x, int64_t n) {
  Vector most = hn::Set(kLanes, -1e30f);
  for_each_vector(n, [&](auto access, int64_t i)
                         HWY_ATTR { most = hn::Max(most, access.keep(access.load(x + i), most)); });
  return max_of(most);
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "ref/number.h"
#include "support/compare.h"
#include "support/simd.h"
#include "support/tensor.h"

namespace mamba3::cpu {
HWY_EXPORT(map);
HWY_EXPORT(dot_any);
HWY_EXPORT(convert_any);
HWY_EXPORT(largest);

namespace {

using testing::for_each_instruction_set;
using testing::Random;
using testing::Tensor;

double reference(Function function, double x) {
  switch (function) {
    case Function::exp:
      return std::exp(x);
    case Function::sigmoid:
      return ref::sigmoid(x);
    case Function::silu:
      return ref::silu(x);
    case Function::softplus:
      return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
  }
  return 0;
}

constexpr Function kFunctions[] = {Function::exp, Function::sigmoid, Function::silu,
                                   Function::softplus};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Simd, FunctionsAreAccurateRelativeToTheResult) {
  Random random(1);
  for_each_instruction_set([&] {
    for (const Function function : kFunctions) {
      const int64_t n = 4099;
      Tensor x({n}), y({n});
      for (int64_t i = 0; i < n; ++i) x.set(i, random.uniform(-85, 85) * (i % 2 ? 1 : 0.05));
      HWY_DYNAMIC_DISPATCH(map)(function, x.view().as<float>(), y.view().as<float>(), n);
      for (int64_t i = 0; i < n; ++i) {
        const double want = reference(function, x.at(i));
        ASSERT_NEAR(y.at(i), want, 6e-7 * std::abs(want))
            << "function " << static_cast<int>(function) << " at " << x.at(i);
      }
    }
  });
}

TEST(Simd, FunctionsHoldAtTheEnds) {
  for_each_instruction_set([&] {
    const std::vector<float> x = {0, 200, -200, kInfinity, -kInfinity, std::nanf("")};
    const std::vector<std::vector<float>> want = {{1, kInfinity, 0, kInfinity, 0},
                                                  {0.5f, 1, 0, 1, 0},
                                                  {0, 200, 0, kInfinity, 0},
                                                  {std::log(2.0f), 200, 0, kInfinity, 0}};
    for (size_t f = 0; f < 4; ++f) {
      std::vector<float> y(x.size());
      HWY_DYNAMIC_DISPATCH(map)(kFunctions[f], x.data(), y.data(), 6);
      for (size_t i = 0; i < 5; ++i) {
        if (kFunctions[f] == Function::silu && x[i] == -kInfinity) continue;  // -inf * 0
        EXPECT_NEAR(y[i] == want[f][i] ? 0 : y[i] - want[f][i], 0, 1e-7)
            << "function " << f << " at " << x[i];
      }
      EXPECT_TRUE(std::isnan(y[5])) << "function " << f;
    }
  });
}

TEST(Simd, DotOfEveryDtypeAndLength) {
  Random random(2);
  for_each_instruction_set([&] {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const int64_t n : {0, 1, 3, 16, 17, 48, 63, 64, 65, 257}) {
        const Tensor a = Tensor::normal(random, {n}), b = Tensor::normal(random, {n}, 1, dtype);
        const std::vector<double> u = a.values(), v = b.values();
        const double want = std::inner_product(u.begin(), u.end(), v.begin(), 0.0);
        const float got =
            HWY_DYNAMIC_DISPATCH(dot_any)(a.view().as<float>(), b.view().data, dtype, n);
        EXPECT_NEAR(got, want, 1e-6 * std::sqrt(static_cast<double>(n))) << name_of(dtype) << n;
      }
    }
  });
}

TEST(Simd, ConvertIsExactAndStaysInside) {
  Random random(3);
  for_each_instruction_set([&] {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const int64_t n : {1, 7, 16, 33}) {
        const Tensor x = Tensor::normal(random, {n}, 1, dtype);
        const Tensor y({n});
        HWY_DYNAMIC_DISPATCH(convert_any)(x.view().data, dtype, y.view().as<float>(), n);
        EXPECT_EQ(y.values(), x.values()) << name_of(dtype);
      }
    }
  });
}

TEST(Simd, KeepLeavesTheRestOut) {
  for_each_instruction_set([&] {
    const std::vector<float> x(21, -5.0f);
    EXPECT_EQ(HWY_DYNAMIC_DISPATCH(largest)(x.data(), 21), -5.0f);
  });
}

}  // namespace
}  // namespace mamba3::cpu
#endif  // HWY_ONCE
