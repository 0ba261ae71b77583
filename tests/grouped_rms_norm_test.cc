#include "ops/grouped_rms_norm.h"

#include <array>
#include <cmath>

#include "core/graph.h"
#include "ref/grouped_rms_norm.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

struct Shape {
  int64_t M, C, groups;

  std::string name() const { return fmt::format("M{}_C{}_groups{}", M, C, groups); }
};

std::vector<double> reference(const Tensor& x, const Tensor& weight, int64_t groups, double eps) {
  return ref::grouped_rms_norm(x.values(), weight.values(), static_cast<size_t>(groups), eps);
}

class GroupedRmsNorm : public ::testing::TestWithParam<Shape> {};

INSTANTIATE_TEST_SUITE_P(Shapes, GroupedRmsNorm,
                         ::testing::Values(Shape{1, 1, 1}, Shape{1, 7, 1}, Shape{1, 10, 2},
                                           Shape{2, 3, 3}, Shape{1, 768, 1}, Shape{3, 48, 3},
                                           Shape{130, 24, 2}, Shape{70, 65, 1}, Shape{5, 4611, 3},
                                           Shape{17, 1536, 2}, Shape{1, 16390, 2}),
                         [](const auto& row) { return row.param.name(); });

TEST_P(GroupedRmsNorm, EqualsTheReference) {
  const auto [M, C, groups] = GetParam();
  Random random(1);
  Context ctx = make_context(2);
  const Tensor weight = Tensor::normal(random, {C});
  for (const DType dtype : test_dtypes()) {
    const Tensor x = Tensor::normal(random, {M, C}, 3, dtype, 2);
    const auto want = reference(x, weight, groups, 1e-5);
    for_each_instruction_set([&, M = M, C = C, groups = groups] {
      const Tensor out({M, C}, dtype, 3), in_place = x.copy();
      grouped_rms_norm(ctx, {.groups = groups, .x = x, .weight = weight, .out = out});
      EXPECT_TRUE(near(out, {M, C}, want, rounded_to(dtype)));
      grouped_rms_norm(ctx, {.groups = groups, .x = in_place, .weight = weight, .out = in_place});
      EXPECT_TRUE(same_bits(in_place, out));
    });
  }
}

// With an eps that counts: it keeps the gradient of a group of one channel from vanishing.
TEST_P(GroupedRmsNorm, BackwardIsTheGradient) {
  const auto [M, C, groups] = GetParam();
  constexpr float kEps = 0.5f;
  Random random(2);
  Context ctx = make_context(2);
  for (const DType dtype : test_dtypes()) {
    const Tensor x = Tensor::normal(random, {M, C}, 1, dtype, 1);
    const Tensor weight = Tensor::normal(random, {C}), earlier = Tensor::normal(random, {C});
    const Tensor d_out = Tensor::normal(random, {M, C}, 1, dtype, 2);
    const auto loss = [&, groups = groups](const std::vector<Complex>& of_x,
                                           const std::vector<Complex>& of_weight) {
      return dot(d_out.values(),
                 ref::grouped_rms_norm(of_x, of_weight, static_cast<size_t>(groups), kEps));
    };
    const auto points = to_complex(x.values()), weights = to_complex(weight.values());
    const auto positions = some_positions(random, M * C, std::min<int64_t>(M * C, 60));
    const auto want_x =
        complex_step([&](const auto& v) { return loss(v, weights); }, x.values(), positions);
    const auto columns = some_positions(random, C, std::min<int64_t>(C, 60));
    const auto want_weight =
        complex_step([&](const auto& v) { return loss(points, v) + dot(earlier.values(), v); },
                     weight.values(), columns);
    for_each_instruction_set([&, M = M, C = C, groups = groups] {
      const Tensor d_x({M, C}, dtype, 3), d_weight = earlier.copy();
      GroupedRmsNormBackwardArgs args{.groups = groups,
                                      .x = x,
                                      .weight = weight,
                                      .eps = kEps,
                                      .d_out = d_out,
                                      .d_x = d_x,
                                      .d_weight = d_weight};
      grouped_rms_norm_backward(ctx, args);
      const Tolerance bound = dtype == DType::f32 ? Tolerance{.unit = 2e-6} : rounded_to(dtype);
      EXPECT_TRUE(near(gather(d_x, positions), want_x, bound));
      EXPECT_TRUE(near(gather(d_weight, columns), want_weight,
                       {.unit = 2e-6, .terms = static_cast<double>(M)}));
      const Tensor in_place = d_out.copy(), d_weight_again = earlier.copy();
      args.d_out = args.d_x = in_place;
      args.d_weight = d_weight_again;
      grouped_rms_norm_backward(ctx, args);
      EXPECT_TRUE(same_bits(in_place, d_x));
      EXPECT_TRUE(same_bits(d_weight_again, d_weight));
    });
  }
}

// Rows without gaps, which the GPU reads four elements at a time where the groups allow: groups for
// warps, then those of which a thread of a block holds one, two and four packs, of few and of many
// rows, and those that are too long or do not divide. The backward with rows apart, which it reads
// one by one, was held against the complex step.
TEST(GroupedRmsNormDense, EqualsTheReference) {
  for (const Shape& s :
       {Shape{3, 4, 1},     Shape{3, 48, 3},     Shape{5, 256, 2},    Shape{3, 264, 2},
        Shape{3, 768, 1},   Shape{2, 4096, 2},   Shape{3, 4096, 1},   Shape{2, 8200, 2},
        Shape{2, 8192, 1},  Shape{2, 8196, 1},   Shape{2, 16384, 1},  Shape{2, 16392, 1},
        Shape{3, 2047, 1},  Shape{3, 66, 2},     Shape{1001, 48, 3},  Shape{600, 512, 1},
        Shape{600, 264, 2}, Shape{600, 1032, 2}, Shape{600, 2052, 1}, Shape{33, 96, 8}}) {
    for (const DType dtype : test_dtypes()) {
      SCOPED_TRACE(fmt::format("{} {}", s.name(), name_of(dtype)));
      Random random(3);
      Context ctx = make_context(2);
      const Tensor x = Tensor::normal(random, {s.M, s.C}, 2, dtype), out({s.M, s.C}, dtype);
      const Tensor weight = Tensor::normal(random, {s.C});
      grouped_rms_norm(ctx, {.groups = s.groups, .x = x, .weight = weight, .out = out});
      EXPECT_TRUE(near(out, reference(x, weight, s.groups, 1e-5), rounded_to(dtype)));

      const Tensor d_out = Tensor::normal(random, {s.M, s.C}, 1, dtype);
      const auto backward = [&](int64_t row_gap) {
        Tensor d_x({s.M, s.C}, dtype, row_gap), d_weight = Tensor::zeros({s.C});
        grouped_rms_norm_backward(ctx, {.groups = s.groups,
                                        .x = x,
                                        .weight = weight,
                                        .d_out = d_out,
                                        .d_x = d_x,
                                        .d_weight = d_weight});
        return std::pair(std::move(d_x), std::move(d_weight));
      };
      const auto [d_x, d_weight] = backward(0);
      const auto [apart, of_apart] = backward(1);
      EXPECT_TRUE(near(d_x, apart.values(), rounded_to(dtype)));
      EXPECT_TRUE(
          near(d_weight, of_apart.values(), {.unit = 2e-6, .terms = static_cast<double>(s.M)}));
    }
  }
}

// Groups of very different sizes do not meet, and each is exact: eps is nothing beside the first,
// and all beside the last two, of which the squares of one are below what f32 holds.
TEST(GroupedRmsNormSizes, FromHugeToTiny) {
  constexpr int64_t M = 3, width = 24, groups = 4, C = groups * width;
  Random random(4);
  Context ctx = make_context(2);
  const Tensor weight = Tensor::normal(random, {C});
  for (const DType dtype : test_dtypes()) {
    const Tensor d_out = Tensor::normal(random, {M, C}, 1, dtype);
    auto values = Tensor::normal(random, {M, C}).values();
    for (size_t i = 0; i < values.size(); ++i)
      values[i] *= std::array{1e15, 1.0, 1e-15, 1e-30}[i % C / width];
    const Tensor x = Tensor::of({M, C}, values, dtype);
    const auto want = reference(x, weight, groups, 1e-5);
    const auto loss = [&](const std::vector<Complex>& v, const std::vector<Complex>& w) {
      return dot(d_out.values(), ref::grouped_rms_norm(v, w, groups, 1e-5));
    };
    const auto points = to_complex(x.values()), weights = to_complex(weight.values());
    const auto want_x = complex_step([&](const auto& v) { return loss(v, weights); }, x.values());
    const auto want_weight =
        complex_step([&](const auto& w) { return loss(points, w); }, weight.values());
    for_each_instruction_set([&] {
      const Tensor out({M, C}, dtype), d_x({M, C}, dtype), d_weight = Tensor::zeros({C});
      grouped_rms_norm(ctx, {.groups = groups, .x = x, .weight = weight, .out = out});
      grouped_rms_norm_backward(ctx, {.groups = groups,
                                      .x = x,
                                      .weight = weight,
                                      .d_out = d_out,
                                      .d_x = d_x,
                                      .d_weight = d_weight});
      for (int64_t first = 0; first < C; first += width) {  // or the huge would hide the others
        SCOPED_TRACE(fmt::format("channels from {}", first));
        const auto part = [&](const std::vector<double>& all, int64_t rows) {
          std::vector<double> of_group;
          for (int64_t m = 0; m < rows; ++m) {
            const auto begin = all.begin() + m * C + first;
            of_group.insert(of_group.end(), begin, begin + width);
          }
          return of_group;
        };
        const auto channels = [&](const Tensor& tensor, int axis) {
          return tensor.view().slice(axis, first, first + width);
        };
        EXPECT_TRUE(near(channels(out, 1), part(want, M), rounded_to(dtype)));
        EXPECT_TRUE(near(channels(d_x, 1), part(want_x, M), rounded_to(dtype, 4)));
        EXPECT_TRUE(near(channels(d_weight, 0), part(want_weight, 1), {.unit = 2e-6}));
      }
    });
  }
}

TEST(GroupedRmsNormNaN, StaysInItsGroup) {
  Context ctx = make_context(1);
  constexpr int64_t M = 2, C = 15, groups = 3;
  for_each_instruction_set([&] {
    Random random(5);
    Tensor x = Tensor::normal(random, {M, C});
    x.set(C + 7, std::nan(""));  // row 1, group 1
    const Tensor weight = Tensor::normal(random, {C}), d_out = Tensor::normal(random, {M, C});
    const Tensor out({M, C}), d_x({M, C}), d_weight = Tensor::zeros({C});
    grouped_rms_norm(ctx, {.groups = groups, .x = x, .weight = weight, .out = out});
    grouped_rms_norm_backward(ctx, {.groups = groups,
                                    .x = x,
                                    .weight = weight,
                                    .d_out = d_out,
                                    .d_x = d_x,
                                    .d_weight = d_weight});
    for (int64_t i = 0; i < M * C; ++i) {
      const bool in_group = i >= C + 5 && i < C + 10;
      EXPECT_EQ(std::isnan(out.at(i)), in_group) << i;
      EXPECT_EQ(std::isnan(d_x.at(i)), in_group) << i;
    }
    for (int64_t i = 0; i < C; ++i) EXPECT_EQ(std::isnan(d_weight.at(i)), i >= 5 && i < 10) << i;
  });
}

TEST(GroupedRmsNormThreads, DoNotChangeABit) {
  Random random(6);
  constexpr int64_t M = 300, C = 262;
  const Tensor x = Tensor::normal(random, {M, C}), weight = Tensor::normal(random, {C});
  const Tensor d_out = Tensor::normal(random, {M, C});
  struct Results {
    Tensor out{M, C}, d_x{M, C}, d_weight = Tensor::zeros({C});
  };
  const auto run = [&](int threads) {
    Context ctx = make_context(threads);
    Results r;
    grouped_rms_norm(ctx, {.groups = 2, .x = x, .weight = weight, .out = r.out});
    grouped_rms_norm_backward(ctx, {.groups = 2,
                                    .x = x,
                                    .weight = weight,
                                    .d_out = d_out,
                                    .d_x = r.d_x,
                                    .d_weight = r.d_weight});
    return r;
  };
  const Results one = run(1);
  for (const int threads : {2, 3}) {
    const Results many = run(threads);
    EXPECT_TRUE(same_bits(many.out, one.out));
    EXPECT_TRUE(same_bits(many.d_x, one.d_x));
    EXPECT_TRUE(same_bits(many.d_weight, one.d_weight));
  }
}

// Each reads what the one before wrote, and on the GPU may start before that has ended.
TEST(GroupedRmsNormGraph, AChainEqualsTheCallsApart) {
  constexpr int kCalls = 6;
  for (const Shape& s : {Shape{1, 1536, 1}, Shape{4, 1536, 24}, Shape{2, 65, 5}}) {
    for (const DType dtype : test_dtypes()) {
      SCOPED_TRACE(fmt::format("{} {}", s.name(), name_of(dtype)));
      Random random(7);
      Context ctx = make_context(2);
      const Tensor x = Tensor::normal(random, {s.M, s.C}, 1, dtype);
      const Tensor weight = Tensor::normal(random, {s.C});
      const auto norm = [&](const Tensor& rows) {
        grouped_rms_norm(ctx, {.groups = s.groups, .x = rows, .weight = weight, .out = rows});
      };
      const Tensor apart = x.copy(), chained({s.M, s.C}, dtype);
      for (int call = 0; call < kCalls; ++call) {
        norm(apart);
        synchronize(ctx);
      }
      Graph graph;
      for (int run = 0; run < 4; ++run) {
        graph.run(ctx, [&] {
          copy(ctx, x, chained);
          for (int call = 0; call < kCalls; ++call) norm(chained);
        });
        EXPECT_TRUE(same_bits(chained, apart));
      }
    }
  }
}

TEST(GroupedRmsNormErrors, OfTheForwardNameTheArgument) {
  Context ctx = make_context(1);
  const Tensor x = Tensor::zeros({2, 6}), weight = Tensor::zeros({6}), out({2, 6}),
               wide = Tensor::zeros({2, 7}), seven = Tensor::zeros({7}),
               rounded = Tensor::zeros({2, 6}, DType::f16), row = Tensor::zeros({1, 6});
  using Args = GroupedRmsNormArgs;
  const Args good{.groups = 2, .x = x, .weight = weight, .out = out};
  const auto message_of = [&](const Args& args) {
    return input_error_of([&] { grouped_rms_norm(ctx, args); });
  };
  const auto with = [&](View Args::*member, const View& view) {
    Args changed = good;
    changed.*member = view;
    return message_of(changed);
  };
  const auto with_groups = [&](int64_t groups) {
    Args changed = good;
    changed.groups = groups;
    return message_of(changed);
  };
  EXPECT_EQ(message_of(good), "nothing thrown");
  EXPECT_EQ(with_groups(4), "[grouped_rms_norm] groups is 4, want a divisor of C = 6");
  EXPECT_EQ(with_groups(0), "[grouped_rms_norm] groups is 0, want a divisor of C = 6");
  EXPECT_EQ(with_groups(-2), "[grouped_rms_norm] groups is -2, want a divisor of C = 6");
  EXPECT_EQ(with(&Args::x, {}), "[grouped_rms_norm] x is missing");
  EXPECT_EQ(with(&Args::x, rounded),
            test_device() == Device::cpu
                ? "[grouped_rms_norm] dtype of x: got f16, want f32"
                : "[grouped_rms_norm] dtype of x: got f16, want f32 or bf16");
  EXPECT_EQ(with(&Args::weight, seven), "[grouped_rms_norm] dim 0 of weight: got 7, want 6");
  EXPECT_EQ(with(&Args::out, wide), "[grouped_rms_norm] dim 1 of out: got 7, want 6");
  EXPECT_EQ(with(&Args::out, rounded), "[grouped_rms_norm] dtype of out: got f16, want f32");
  const Args shifted{.groups = 2,
                     .x = x.view().slice(0, 0, 1),
                     .weight = weight,
                     .out = make_view(x.view().as<float>() + 1, DType::f32, {1, 6}, test_device())};
  EXPECT_EQ(message_of(shifted), "[grouped_rms_norm] out and x must not share memory");
  const Args over_weight{
      .groups = 2, .x = row, .weight = weight, .out = weight.view().reshape({1, 6})};
  EXPECT_EQ(message_of(over_weight), "[grouped_rms_norm] out and weight must not share memory");
}

TEST(GroupedRmsNormErrors, OfTheBackwardNameTheArgument) {
  Context ctx = make_context(1);
  const Tensor x = Tensor::zeros({1, 6}), weight = Tensor::zeros({6}),
               d_out = Tensor::zeros({1, 6}), d_x({1, 6}), d_weight = Tensor::zeros({6}),
               wide = Tensor::zeros({1, 7}), seven = Tensor::zeros({7}),
               rounded = Tensor::zeros({1, 6}, DType::f16);
  using Args = GroupedRmsNormBackwardArgs;
  const Args good{
      .groups = 3, .x = x, .weight = weight, .d_out = d_out, .d_x = d_x, .d_weight = d_weight};
  const auto with = [&](View Args::*member, const View& view) {
    Args changed = good;
    changed.*member = view;
    return input_error_of([&] { grouped_rms_norm_backward(ctx, changed); });
  };
  EXPECT_EQ(with(&Args::x, x), "nothing thrown");
  EXPECT_EQ(with(&Args::x, {}), "[grouped_rms_norm_backward] x is missing");
  EXPECT_EQ(with(&Args::x, wide),
            "[grouped_rms_norm_backward] groups is 3, want a divisor of C = 7");
  EXPECT_EQ(with(&Args::weight, seven),
            "[grouped_rms_norm_backward] dim 0 of weight: got 7, want 6");
  EXPECT_EQ(with(&Args::d_out, wide), "[grouped_rms_norm_backward] dim 1 of d_out: got 7, want 6");
  EXPECT_EQ(with(&Args::d_out, rounded),
            "[grouped_rms_norm_backward] dtype of d_out: got f16, want f32");
  EXPECT_EQ(with(&Args::d_x, {}), "[grouped_rms_norm_backward] d_x is missing");
  EXPECT_EQ(with(&Args::d_x, wide), "[grouped_rms_norm_backward] dim 1 of d_x: got 7, want 6");
  EXPECT_EQ(with(&Args::d_weight, seven),
            "[grouped_rms_norm_backward] dim 0 of d_weight: got 7, want 6");
  EXPECT_EQ(with(&Args::d_out, wide.view().slice(1, 0, 6)), "nothing thrown");
  Args shifted = good;
  shifted.d_out = wide.view().slice(1, 0, 6);
  shifted.d_x = wide.view().slice(1, 1, 7);
  EXPECT_EQ(input_error_of([&] { grouped_rms_norm_backward(ctx, shifted); }),
            "[grouped_rms_norm_backward] d_x and d_out must not share memory");
  EXPECT_EQ(with(&Args::d_x, x), "[grouped_rms_norm_backward] d_x and x must not share memory");
  EXPECT_EQ(with(&Args::d_x, weight.view().reshape({1, 6})),
            "[grouped_rms_norm_backward] d_x and weight must not share memory");
  EXPECT_EQ(with(&Args::d_weight, weight),
            "[grouped_rms_norm_backward] d_weight and weight must not share memory");
}

}  // namespace
}  // namespace mamba3::testing
