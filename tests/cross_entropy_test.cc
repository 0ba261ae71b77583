#include "ops/cross_entropy.h"

#include <cmath>

#include "ref/cross_entropy.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

struct Case {
  int64_t M, D, V, vocab;
};

class CrossEntropy : public ::testing::TestWithParam<Case> {};

// Of the last four, two are more than one tile of vocabulary and more than one slice of tokens on
// the CPU, two are more than one tile, and more than one step along D, of the products on a GPU.
INSTANTIATE_TEST_SUITE_P(Shapes, CrossEntropy,
                         ::testing::Values(Case{1, 1, 1, 1}, Case{1, 7, 5, 5},
                                           Case{3, 48, 264, 257}, Case{33, 20, 100, 100},
                                           Case{5, 8, 9000, 8999}, Case{1100, 3, 8, 6},
                                           Case{130, 8, 300, 299}, Case{20, 72, 260, 257}),
                         [](const auto& row) {
                           const Case& c = row.param;
                           return fmt::format("M{}_D{}_V{}", c.M, c.D, c.V);
                         });

// Random inputs of a case; one token is not scored if there are several.
struct Inputs {
  Tensor hidden, weight, targets;

  Inputs(Random& random, const Case& c, DType dtype = DType::f32)
      : hidden(Tensor::normal(random, {c.M, c.D}, 1,
                              test_device() == Device::cpu ? DType::f32 : dtype, 3)),
        weight(Tensor::normal(random, {c.V, c.D}, 2 / std::sqrt(c.D), dtype)),
        targets(Tensor::integers(random, {c.M}, 0, c.vocab)) {
    targets.set(0, static_cast<double>(c.vocab - 1));
    if (c.M > 2) targets.set(1, -1);
  }
  std::span<const int32_t> ids() const {
    return {targets.host().as<int32_t>(), static_cast<size_t>(targets.view().size())};
  }
};

// The matrix units of a GPU round sums of bf16 products less well than f32.
Tolerance tolerance(const Case& c, DType dtype) {
  const bool units = test_device() == Device::cuda && dtype == DType::bf16;
  return {.unit = units ? 4e-6 : 1e-6, .terms = static_cast<double>(c.D)};
}

TEST_P(CrossEntropy, EqualsTheReferenceForEveryDtype) {
  const Case c = GetParam();
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (dtype == DType::f16 && test_device() == Device::cuda) continue;
    Random random(1);
    Context ctx = make_context(2);
    const Inputs in(random, c, dtype);
    const auto want = ref::cross_entropy(in.hidden.values(), in.weight.values(), in.ids(),
                                         static_cast<size_t>(c.vocab));
    for_each_instruction_set([&] {
      const Tensor nll({c.M}), lse({c.M});
      cross_entropy(ctx, {.hidden = in.hidden,
                          .weight = in.weight,
                          .targets = in.targets,
                          .vocab = c.vocab,
                          .nll = nll,
                          .lse = lse,
                          .d_hidden = {},
                          .d_weight = {}});
      EXPECT_TRUE(near(nll, {c.M}, want.nll, tolerance(c, dtype))) << name_of(dtype);
      EXPECT_TRUE(near(lse, {c.M}, want.lse, tolerance(c, dtype))) << name_of(dtype);
      for (int64_t m = 0; m < c.M; ++m) {
        EXPECT_TRUE(in.targets.at(m) >= 0 || nll.at(m) == 0) << "not scored";
      }
    });
  }
}

TEST_P(CrossEntropy, GradientsAreThoseOfTheScaledSum) {
  const Case c = GetParam();
  constexpr double kScale = 0.125;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Random random(2);
    Context ctx = make_context(2);
    const Inputs in(random, c, dtype);
    const Tensor earlier = Tensor::normal(random, {c.V, c.D});
    const auto loss = [&](const std::vector<Complex>& hidden, const std::vector<Complex>& weight) {
      const auto result =
          ref::cross_entropy(hidden, weight, in.ids(), static_cast<size_t>(c.vocab));
      Complex sum = 0;
      for (const Complex& nll : result.nll) sum += kScale * nll;
      return sum;
    };
    const auto hidden = to_complex(in.hidden.values()), weight = to_complex(in.weight.values());
    const auto of_hidden = some_positions(random, c.M * c.D, std::min<int64_t>(c.M * c.D, 20));
    const auto of_weight = some_positions(random, c.vocab * c.D, std::min<int64_t>(c.V * c.D, 20));
    const auto want_hidden =
        complex_step([&](const std::vector<Complex>& x) { return loss(x, weight); },
                     in.hidden.values(), of_hidden);
    auto want_weight = complex_step([&](const std::vector<Complex>& w) { return loss(hidden, w); },
                                    in.weight.values(), of_weight);
    for (size_t i = 0; i < of_weight.size(); ++i) want_weight[i] += earlier.at(of_weight[i]);
    for_each_instruction_set([&] {
      const Tensor nll({c.M}), d_hidden({c.M, c.D}, in.hidden.view().dtype, 2);
      const Tensor d_weight = earlier.copy(), scale = Tensor::of({1}, std::vector{kScale});
      cross_entropy(ctx, {.hidden = in.hidden,
                          .weight = in.weight,
                          .targets = in.targets,
                          .vocab = c.vocab,
                          .nll = nll,
                          .lse = {},
                          .d_hidden = d_hidden,
                          .d_weight = d_weight,
                          .scale = scale});
      // The gradient of the logits has the dtype of hidden.
      Tolerance sums{.unit = 2e-6, .terms = static_cast<double>(c.D + c.M)};
      if (in.hidden.view().dtype == DType::bf16) sums = rounded_to(DType::bf16);
      EXPECT_TRUE(near(gather(d_hidden, of_hidden), want_hidden, sums));
      EXPECT_TRUE(near(gather(d_weight, of_weight), want_weight, sums));
      const View padding = d_weight.view().slice(0, c.vocab, c.V);
      if (padding.size() > 0) {
        EXPECT_TRUE(same_bits(padding, earlier.view().slice(0, c.vocab, c.V)));
      }
      if (c.M > 2) {
        for (int64_t d = 0; d < c.D; ++d) EXPECT_EQ(d_hidden.at(c.D + d), 0) << "not scored";
      }
    });
  }
}

// Runs with what is present; nll alone must not depend on the gradients asked for.
struct Results {
  Tensor nll, lse, d_hidden, d_weight;
};

Results run(Context& ctx, const Inputs& in, const Case& c, bool d_hidden, bool d_weight) {
  Results r{Tensor({c.M}), Tensor({c.M}), Tensor({c.M, c.D}), Tensor::zeros({c.V, c.D})};
  cross_entropy(ctx, {.hidden = in.hidden,
                      .weight = in.weight,
                      .targets = in.targets,
                      .vocab = c.vocab,
                      .nll = r.nll,
                      .lse = r.lse,
                      .d_hidden = d_hidden ? r.d_hidden.view() : View{},
                      .d_weight = d_weight ? r.d_weight.view() : View{}});
  return r;
}

TEST(CrossEntropyGradients, ComeAloneOrTogether) {
  const Case c{70, 40, 300, 290};
  Random random(3);
  Context ctx = make_context(2);
  const Inputs in(random, c);
  const Results both = run(ctx, in, c, true, true), hidden = run(ctx, in, c, true, false),
                weight = run(ctx, in, c, false, true), none = run(ctx, in, c, false, false);
  EXPECT_TRUE(same_bits(hidden.d_hidden, both.d_hidden));
  EXPECT_TRUE(same_bits(weight.d_weight, both.d_weight));
  EXPECT_TRUE(same_bits(none.nll, both.nll));
}

TEST(CrossEntropyRows, ASingleOneMayHaveAnyStride) {
  const Case c{1, 5, 7, 7};
  Random random(7);
  Context ctx = make_context(1);
  const Inputs in(random, c);
  const Results want = run(ctx, in, c, true, true);
  const Results got{Tensor({1}), Tensor({1}), Tensor({1, 5}), Tensor::zeros({7, 5})};
  View hidden = in.hidden, d_hidden = got.d_hidden;
  hidden.strides[0] = d_hidden.strides[0] = 0;
  cross_entropy(ctx, {.hidden = hidden,
                      .weight = in.weight,
                      .targets = in.targets,
                      .vocab = 7,
                      .nll = got.nll,
                      .d_hidden = d_hidden,
                      .d_weight = got.d_weight});
  EXPECT_TRUE(same_bits(got.nll, want.nll));
  EXPECT_TRUE(same_bits(got.d_hidden, want.d_hidden));
  EXPECT_TRUE(same_bits(got.d_weight, want.d_weight));
}

TEST(CrossEntropyThreads, DoNotChangeABit) {
  const Case c{130, 40, 5000, 4999};
  Random random(4);
  const Inputs in(random, c, DType::bf16);
  Context ctx1 = make_context(1);
  const Results one = run(ctx1, in, c, true, true);
  for (const int threads : {2, 3}) {
    Context ctx = make_context(threads);
    const Results many = run(ctx, in, c, true, true);
    EXPECT_TRUE(same_bits(many.nll, one.nll));
    EXPECT_TRUE(same_bits(many.lse, one.lse));
    EXPECT_TRUE(same_bits(many.d_hidden, one.d_hidden));
    EXPECT_TRUE(same_bits(many.d_weight, one.d_weight));
  }
}

TEST(CrossEntropyExtremes, LargeLogitsDoNotOverflow) {
  Context ctx = make_context(1);
  const Tensor hidden = Tensor::of({1, 1}, std::vector<double>{1000}), nll({1}), lse({1});
  const Tensor weight = Tensor::of({3, 1}, std::vector<double>{1, -1, 0.999});
  cross_entropy(ctx, {.hidden = hidden,
                      .weight = weight,
                      .targets = Tensor::of_ids({1}),
                      .vocab = 3,
                      .nll = nll,
                      .lse = lse,
                      .d_hidden = {},
                      .d_weight = {}});
  EXPECT_NEAR(nll.at(0), 2000 + std::log(1 + std::exp(-1)), 1e-3);
}

TEST(CrossEntropyExtremes, NaNShows) {
  const Case c{3, 8, 40, 40};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Random random(5);
    Context ctx = make_context(1);
    Inputs in(random, c, dtype);
    in.weight.set(37 * 8, std::nan(""));  // of a token that no target names
    for (int64_t i = 0; i < 3; ++i) in.targets.set(i, 0);
    const Results r = run(ctx, in, c, true, true);
    for (int64_t i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(r.nll.at(i)));
    EXPECT_TRUE(std::isnan(r.d_hidden.at(0)));
  }
}

// A GPU takes exponentials before it knows the largest logit of a row; here it is far above all
// those that a sample of the vocabulary would show.
TEST(CrossEntropyExtremes, OneLogitFarAboveTheOthers) {
  const Case c{2, 8, 2000, 2000};
  const int64_t peak = 1;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Random random(8);
    Context ctx = make_context(1);
    Inputs in(random, c, dtype);
    for (int64_t d = 0; d < c.D; ++d) {
      in.hidden.set(d, 1);
      in.hidden.set(c.D + d, 0.5);
      in.weight.set(peak * c.D + d, 32);
    }
    const auto want = ref::cross_entropy(in.hidden.values(), in.weight.values(), in.ids(),
                                         static_cast<size_t>(c.vocab));
    const Results r = run(ctx, in, c, true, true);
    EXPECT_TRUE(near(r.nll, {c.M}, want.nll, tolerance(c, dtype))) << name_of(dtype);
    EXPECT_TRUE(near(r.lse, {c.M}, want.lse, tolerance(c, dtype))) << name_of(dtype);
    for (int64_t m = 0; m < c.M; ++m) {  // p = 1 at the peak
      const auto target = static_cast<int64_t>(in.ids()[static_cast<size_t>(m)]);
      for (int64_t d = 0; d < c.D; ++d) {
        EXPECT_NEAR(r.d_hidden.at(m * c.D + d), 32 - in.weight.at(target * c.D + d), 0.3);
      }
      EXPECT_NEAR(r.d_weight.at(target * c.D), -in.hidden.at(m * c.D), 0.01);
    }
  }
}

TEST(CrossEntropySlices, AreNearlyEqualMultiplesOfTheStep) {
  const auto slice = [](int64_t M, int64_t tokens) {
    return cross_entropy_slice(M, 100, 100 * tokens);
  };
  EXPECT_EQ(slice(1, 1000), 1);
  EXPECT_EQ(slice(1000, 1024), 1000) << "one slice, whatever its size";
  EXPECT_EQ(slice(1025, 1024), 768) << "two: 768 and 257";
  EXPECT_EQ(slice(16384, 6278), 5632) << "three, not two of 6144 and a rest";
  EXPECT_EQ(slice(16384, 1), kCrossEntropyStep) << "not less than a step";
  EXPECT_EQ(slice(16384, 16384), 16384);
  for (int64_t M = 1; M < 5000; M += 37) {
    for (const int64_t tokens : {256, 700, 2048}) {
      const int64_t rows = slice(M, tokens);
      EXPECT_LE(rows, tokens);
      EXPECT_TRUE(rows == M || rows % kCrossEntropyStep == 0);
    }
  }
}

// By default, of what a token needs there (cuda/cross_entropy.cu): the exponentials and the scaled
// row in bf16, its gradient and the sums of the tiles in f32.
TEST(CrossEntropySlices, OfALargeBatchAreTwo) {
  for (const int64_t D : {768, 2048}) {
    const int64_t bytes = 128256 * 2 + D * (2 + 4) + 128256 / 256 * 4;
    EXPECT_EQ(cross_entropy_slice(16384, bytes, CrossEntropyArgs{}.slice_bytes), 8192) << D;
  }
}

TEST(CrossEntropySlices, AddUpToTheWhole) {
  const Case c{600, 16, 300, 290};
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Random random(9);
    Context ctx = make_context(2);
    const Inputs in(random, c, dtype);
    const Results whole = run(ctx, in, c, true, true);
    const Results parts{Tensor({c.M}), Tensor({c.M}), Tensor({c.M, c.D}),
                        Tensor::zeros({c.V, c.D})};
    cross_entropy(ctx, {.hidden = in.hidden,
                        .weight = in.weight,
                        .targets = in.targets,
                        .vocab = c.vocab,
                        .nll = parts.nll,
                        .lse = parts.lse,
                        .d_hidden = parts.d_hidden,
                        .d_weight = parts.d_weight,
                        .slice_bytes = 1});
    EXPECT_TRUE(near(parts.nll, whole.nll.values(), {.unit = 1e-6})) << name_of(dtype);
    EXPECT_TRUE(near(parts.d_hidden, whole.d_hidden.values(), {.unit = 4e-6, .terms = 300}));
    EXPECT_TRUE(near(parts.d_weight, whole.d_weight.values(), {.unit = 4e-6, .terms = 600}));
  }
}

TEST(CrossEntropyScratch, IsBoundedAndReused) {
  const Case c{300, 2, 150000, 150000};
  Random random(6);
  Context ctx = make_context(2);
  const Inputs in(random, c);
  run(ctx, in, c, true, false);
  if (test_device() == Device::cpu) {
    EXPECT_LT(ctx.scratch.capacity(), 150 << 20) << "all logits would be 180 MB";
  }
  const int64_t allocations = ctx.scratch.allocations();
  run(ctx, in, c, true, false);
  EXPECT_EQ(ctx.scratch.allocations(), allocations);
}

TEST(CrossEntropyErrors, NameTheArgument) {
  using Args = CrossEntropyArgs;
  Context ctx = make_context(1);
  const Tensor hidden = Tensor::zeros({2, 4}), weight = Tensor::zeros({6, 4}), nll({2}), lse({2});
  const Tensor d_hidden({2, 4}), d_weight = Tensor::zeros({6, 4}), narrow({6, 3}), three({3});
  const Tensor targets = Tensor::of_ids({0, 4}), outside = Tensor::of_ids({0, 5});
  const Args good{.hidden = hidden,
                  .weight = weight,
                  .targets = targets,
                  .vocab = 5,
                  .nll = nll,
                  .lse = lse,
                  .d_hidden = d_hidden,
                  .d_weight = d_weight};
  const auto message = [&](const Args& args) {
    return input_error_of([&] { cross_entropy(ctx, args); });
  };
  const auto with = [&](View Args::*member, const View& view) {
    Args args = good;
    args.*member = view;
    return message(args);
  };
  EXPECT_EQ(message(good), "nothing thrown");
  EXPECT_EQ(with(&Args::hidden, {}), "[cross_entropy] hidden is missing");
  EXPECT_EQ(with(&Args::weight, narrow), "[cross_entropy] dim 1 of weight: got 3, want 4");
  EXPECT_EQ(with(&Args::targets, {}), "[cross_entropy] targets is missing");
  if (test_device() == Device::cpu) {
    EXPECT_EQ(with(&Args::targets, outside),
              "[cross_entropy] targets[1] is 5, want -1 <= value < 5");
  }
  EXPECT_EQ(with(&Args::nll, three), "[cross_entropy] dim 0 of nll: got 3, want 2");
  EXPECT_EQ(with(&Args::lse, three), "[cross_entropy] dim 0 of lse: got 3, want 2");
  EXPECT_EQ(with(&Args::scale, three), "[cross_entropy] dim 0 of scale: got 3, want 1");
  EXPECT_EQ(with(&Args::d_hidden, narrow), "[cross_entropy] dim 0 of d_hidden: got 6, want 2");
  EXPECT_EQ(with(&Args::d_weight, narrow), "[cross_entropy] dim 1 of d_weight: got 3, want 4");
  EXPECT_EQ(with(&Args::d_hidden, hidden),
            "[cross_entropy] d_hidden and hidden must not share memory");
  EXPECT_EQ(with(&Args::d_weight, weight),
            "[cross_entropy] d_weight and weight must not share memory");
  for (const int64_t vocab : {0, 7}) {
    Args args = good;
    args.vocab = vocab;
    EXPECT_EQ(message(args), "[cross_entropy] vocab must be between 1 and the rows of weight");
  }
}

}  // namespace
}  // namespace mamba3::testing
