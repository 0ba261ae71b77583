#include "cpu/gemm.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <limits>

#include "support/compare.h"
#include "support/tensor.h"

namespace mamba3::cpu {
namespace {

using testing::near;
using testing::Random;
using testing::Tensor;

// A product with random operands whose rows have gaps behind them.
struct Product {
  Gemm gemm;
  Tensor a, b, c;
  std::vector<double> want;

  Product(Random& random, int64_t M, int64_t N, int64_t K, bool transpose_a, bool transpose_b,
          float beta)
      : a(transpose_a ? Tensor::normal(random, {K, M}, 1, DType::f32, 3)
                      : Tensor::normal(random, {M, K}, 1, DType::f32, 3)),
        b(transpose_b ? Tensor::normal(random, {N, K}, 1, DType::f32, 2)
                      : Tensor::normal(random, {K, N}, 1, DType::f32, 2)),
        c(Tensor::normal(random, {M, N}, 1, DType::f32, 1)) {
    gemm = {.transpose_a = transpose_a,
            .transpose_b = transpose_b,
            .M = M,
            .N = N,
            .K = K,
            .a = a.view().as<float>(),
            .lda = a.view().stride(0),
            .b = b.view().as<float>(),
            .ldb = b.view().stride(0),
            .beta = beta,
            .c = c.view().as<float>(),
            .ldc = c.view().stride(0)};
    const std::vector<double> as = a.values(), bs = b.values(), cs = c.values();
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = static_cast<double>(beta) * cs[static_cast<size_t>(m * N + n)];
        for (int64_t k = 0; k < K; ++k) {
          sum += as[static_cast<size_t>(transpose_a ? k * M + m : m * K + k)] *
                 bs[static_cast<size_t>(transpose_b ? n * K + k : k * N + n)];
        }
        want.push_back(sum);
      }
    }
  }
};

void fill(const Tensor& tensor, double value) {
  for (int64_t i = 0; i < tensor.view().size(); ++i) testing::set_value(tensor, i, value);
}

TEST(Gemm, EveryLayoutOnOneThreadAndOnSeveral) {
  Random random(1);
  Context ctx(3);
  const int64_t shapes[][3] = {{1, 1, 1},   {2, 3, 5},    {17, 1, 33},    {1, 40, 7},
                               {64, 64, 9}, {31, 70, 64}, {270, 260, 20}, {48, 40, 700}};
  for (const auto& [M, N, K] : shapes) {
    for (const bool transpose_a : {false, true}) {
      for (const bool transpose_b : {false, true}) {
        for (const float beta : {0.0f, 1.0f, -0.5f}) {
          SCOPED_TRACE(fmt::format("M {} N {} K {} transpose {} {} beta {}", M, N, K, transpose_a,
                                   transpose_b, beta));
          const auto terms = static_cast<double>(K);
          const Product serial(random, M, N, K, transpose_a, transpose_b, beta);
          gemm_serial(serial.gemm);
          EXPECT_TRUE(near(serial.c, serial.want, {.terms = terms}));
          const Product shared(random, M, N, K, transpose_a, transpose_b, beta);
          gemm(ctx, shared.gemm);
          EXPECT_TRUE(near(shared.c, shared.want, {.terms = terms}));
        }
      }
    }
  }
}

TEST(Gemm, BetaZeroOverwritesNan) {
  Random random(2);
  Context ctx(2);
  Product product(random, 40, 300, 200, false, true, 0);
  fill(product.c, std::numeric_limits<double>::quiet_NaN());
  gemm(ctx, product.gemm);
  EXPECT_TRUE(near(product.c, product.want, {.terms = 200}));
}

TEST(Gemm, AnEmptySumIsZero) {
  Context ctx(2);
  for (const float beta : {0.0f, 0.5f, 1.0f}) {
    Tensor c({3, 4}, DType::f32, 2);
    fill(c, 6);
    const Gemm empty{.M = 3, .N = 4, .beta = beta, .c = c.view().as<float>(), .ldc = 6};
    gemm(ctx, empty);
    EXPECT_TRUE(near(c, std::vector<double>(12, 6.0 * static_cast<double>(beta)), {}));
  }
}

TEST(Gemm, AnEmptyResultIsLeftAlone) {
  Context ctx(2);
  Tensor c({3, 4});
  fill(c, 6);
  for (const auto& [M, N] : {std::pair{0, 4}, std::pair{3, 0}}) {
    const Gemm nothing{.M = M, .N = N, .K = 2, .c = c.view().as<float>(), .ldc = 4};
    gemm(ctx, nothing);
    gemm_serial(nothing);
  }
  EXPECT_TRUE(near(c, std::vector<double>(12, 6.0), {}));
}

TEST(Gemm, SameBitsForAnyNumberOfThreads) {
  Random random(3);
  Context one(1);
  for (const auto& [M, N, K] :
       {std::array<int64_t, 3>{70, 300, 200}, {300, 70, 200}, {64, 48, 2000}}) {
    Product product(random, M, N, K, true, false, 0);
    gemm(one, product.gemm);
    const Tensor first = product.c.copy();
    for (const int threads : {2, 3}) {
      Context several(threads);
      fill(product.c, 0);
      gemm(several, product.gemm);
      EXPECT_TRUE(testing::same_bits(product.c, first)) << threads << " threads";
    }
  }
}

}  // namespace
}  // namespace mamba3::cpu
