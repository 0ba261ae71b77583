#include "ops/embedding.h"

#include <cmath>

#include "ref/embedding.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

struct Shape {
  int64_t M, D;
};

constexpr int64_t kV = 11;

class Embedding : public ::testing::TestWithParam<Shape> {};

INSTANTIATE_TEST_SUITE_P(Shapes, Embedding,
                         ::testing::Values(Shape{1, 1}, Shape{1, 768}, Shape{9, 7}, Shape{40, 48},
                                           Shape{300, 130}),
                         [](const auto& row) {
                           return fmt::format("M{}_D{}", row.param.M, row.param.D);
                         });

std::span<const int32_t> span_of(const Tensor& ids) {
  return {ids.host().as<int32_t>(), static_cast<size_t>(ids.view().size())};
}

TEST_P(Embedding, CopiesRowsOfEveryDtypeExactly) {
  const auto [M, D] = GetParam();
  Random random(1);
  Context ctx = make_context(2);
  const Tensor ids = Tensor::integers(random, {M}, 0, kV);
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const Tensor weight = Tensor::normal(random, {kV, D}, 1, dtype);
    const auto want = ref::embedding(span_of(ids), weight.values(), static_cast<size_t>(D));
    for_each_instruction_set([&, M = M, D = D] {
      const Tensor out({M, D});
      embedding(ctx, {.ids = ids, .weight = weight, .out = out});
      EXPECT_EQ(out.values(), want) << name_of(dtype);
    });
  }
}

TEST_P(Embedding, BackwardIsTheGradient) {
  const auto [M, D] = GetParam();
  Random random(2);
  Context ctx = make_context(2);
  const Tensor ids = Tensor::integers(random, {M}, 0, kV);  // many more than once
  const Tensor d_out = Tensor::normal(random, {M, D}), earlier = Tensor::normal(random, {kV, D});
  const auto loss = [&, D = D](const std::vector<Complex>& weight) {
    return dot(d_out.values(), ref::embedding(span_of(ids), weight, static_cast<size_t>(D))) +
           dot(earlier.values(), weight);
  };
  const auto positions = some_positions(random, kV * D, std::min<int64_t>(kV * D, 50));
  const auto want = complex_step(loss, earlier.values(), positions);
  for_each_instruction_set([&, M = M] {
    const Tensor d_weight = earlier.copy();
    embedding_backward(ctx, {.ids = ids, .d_out = d_out, .d_weight = d_weight});
    EXPECT_TRUE(near(gather(d_weight, positions), want, {.terms = static_cast<double>(M)}));
  });
}

// Ids of three bytes, most of them rare, and one that half of the tokens have.
TEST(EmbeddingBackward, OfALargeVocabulary) {
  Random random(4);
  constexpr int64_t V = 70001, M = 5000, D = 5;
  Context ctx = make_context(2);
  Tensor ids = Tensor::integers(random, {M}, 0, V);
  for (int64_t i = 0; i < M; i += 2) ids.set(i, 65536);
  ids.set(1, V - 1);
  const Tensor d_out = Tensor::normal(random, {M, D}), d_weight = Tensor::zeros({V, D});
  std::vector<double> want(V * D, 0.0);
  for (int64_t m = 0; m < M; ++m) {
    const auto row = static_cast<int64_t>(ids.at(m));
    for (int64_t d = 0; d < D; ++d) want[static_cast<size_t>(row * D + d)] += d_out.at(m * D + d);
  }
  embedding_backward(ctx, {.ids = ids, .d_out = d_out, .d_weight = d_weight});
  // Most rows are zero, so the bound is that of the largest.
  EXPECT_TRUE(near(d_weight, want, {.terms = M}));
}

// The CPU throws; the GPU could only after waiting for the ids.
TEST(EmbeddingErrors, ShowAsNaNOnTheGpu) {
  if (test_device() == Device::cpu) GTEST_SKIP() << "for the GPU";
  Context ctx = make_context(1);
  const Tensor ids = Tensor::of_ids({1, 3, -1, 1});
  const Tensor weight = Tensor::of({3, 1}, std::vector<double>{4, 5, 6}), out({4, 1});
  embedding(ctx, {.ids = ids, .weight = weight, .out = out});
  EXPECT_EQ(out.at(0), 5);
  EXPECT_TRUE(std::isnan(out.at(1)));
  EXPECT_TRUE(std::isnan(out.at(2)));
  const Tensor d_out = Tensor::of({4, 1}, std::vector<double>{1, 2, 3, 4});
  const Tensor d_weight = Tensor::zeros({3, 1});
  embedding_backward(ctx, {.ids = ids, .d_out = d_out, .d_weight = d_weight});
  EXPECT_EQ(d_weight.values(), (std::vector<double>{0, 5, 0}));
}

TEST(EmbeddingThreads, DoNotChangeABit) {
  Random random(3);
  constexpr int64_t M = 700, D = 200;
  const Tensor ids = Tensor::integers(random, {M}, 0, kV), d_out = Tensor::normal(random, {M, D});
  const auto run = [&](int threads) {
    Context ctx = make_context(threads);
    Tensor d_weight = Tensor::zeros({kV, D});
    embedding_backward(ctx, {.ids = ids, .d_out = d_out, .d_weight = d_weight});
    return d_weight;
  };
  const Tensor one = run(1);
  EXPECT_TRUE(same_bits(run(2), one));
  EXPECT_TRUE(same_bits(run(3), one));
}

TEST(EmbeddingErrors, NameTheArgument) {
  Context ctx = make_context(1);
  const Tensor ids = Tensor::of_ids({0, 2}), outside = Tensor::of_ids({1, 3}),
               negative = Tensor::of_ids({-1, 0});
  const Tensor weight = Tensor::zeros({3, 4}), out({2, 4}), narrow({2, 3});
  const auto forward = [&](const View& i, const View& w, const View& o) {
    return input_error_of([&] { embedding(ctx, {.ids = i, .weight = w, .out = o}); });
  };
  EXPECT_EQ(forward(ids, weight, out), "nothing thrown");
  EXPECT_EQ(forward({}, weight, out), "[embedding] ids is missing");
  EXPECT_EQ(forward(ids, {}, out), "[embedding] weight is missing");
  EXPECT_EQ(forward(ids, weight, narrow), "[embedding] dim 1 of out: got 3, want 4");
  EXPECT_EQ(forward(out.view().slice(1, 0, 1), weight, out),
            "[embedding] dtype of ids: got f32, want i32");
  EXPECT_EQ(forward(ids, Tensor({3, 4}, DType::i32), out),
            "[embedding] dtype of weight: got i32, want f32 or bf16 or f16");
  const bool reads_ids = test_device() == Device::cpu;
  if (reads_ids) {
    EXPECT_EQ(forward(outside, weight, out), "[embedding] ids[1] is 3, want 0 <= value < 3");
    EXPECT_EQ(forward(negative, weight, out), "[embedding] ids[0] is -1, want 0 <= value < 3");
  }
  EXPECT_EQ(forward(ids, weight, weight.view().slice(0, 0, 2)),
            "[embedding] out and weight must not share memory");
  const auto backward = [&](const View& i, const View& d_out, const View& d_weight) {
    return input_error_of(
        [&] { embedding_backward(ctx, {.ids = i, .d_out = d_out, .d_weight = d_weight}); });
  };
  EXPECT_EQ(backward({}, out, weight), "[embedding_backward] ids is missing");
  EXPECT_EQ(backward(ids, narrow, weight), "[embedding_backward] dim 1 of d_out: got 3, want 4");
  EXPECT_EQ(backward(ids, out, {}), "[embedding_backward] d_weight is missing");
  if (reads_ids) {
    EXPECT_EQ(backward(outside, out, weight),
              "[embedding_backward] ids[1] is 3, want 0 <= value < 3");
  }
  EXPECT_EQ(backward(ids, weight.view().slice(0, 0, 2), weight),
            "[embedding_backward] d_weight and d_out must not share memory");
}

}  // namespace
}  // namespace mamba3::testing
