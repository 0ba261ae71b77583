#include "ops/delta_scan.h"

#include <cmath>

#include "ops/delta_step.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/delta.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

// Between two results that are both rounded.
Tolerance twice(Tolerance tolerance) {
  tolerance.unit *= 2;
  return tolerance;
}

class DeltaScan : public ::testing::TestWithParam<DeltaCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, DeltaScan, ::testing::ValuesIn(delta_cases()),
                         [](const auto& row) { return row.param.name; });

TEST_P(DeltaScan, EqualsTheReference) {
  const auto& [name, s, B, T] = GetParam();
  for (const DType dtype : test_dtypes()) {
    Random random(1);
    Context ctx = make_context(2);
    const DeltaParamTensors params(random, s);
    const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()}, 1, dtype, 5);
    for_each_instruction_set([&, &s = s, B = B, T = T] {
      const Tensor y({B, T, s.d_inner()}, dtype, 3);
      Random again(2);
      const DeltaStateTensors state(again, s, B);
      auto states = reference_states(state, B);
      const auto want = reference_scan(s, params, proj, states);
      delta_scan(
          ctx,
          {.shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()});
      EXPECT_TRUE(near(y, want, rounded(delta_tolerance(s, T), dtype)));
      for (int64_t b = 0; b < B; ++b) {
        expect_state(state, b, states[static_cast<size_t>(b)], delta_tolerance(s, T));
      }
    });
  }
}

TEST_P(DeltaScan, WithoutAStateStartsFromZero) {
  const auto& [name, s, B, T] = GetParam();
  Random random(3);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()});
  std::vector<std::vector<double>> states(
      static_cast<size_t>(B), std::vector<double>(static_cast<size_t>(s.H * s.V * s.K)));
  const auto want = reference_scan(s, params, proj, states);
  delta_scan(ctx, {.shape = s, .params = params.views(), .proj = proj, .y = y});
  EXPECT_TRUE(near(y, want, delta_tolerance(s, T)));
}

TEST_P(DeltaScan, StepsEqualOneScan) {
  const auto& [name, s, B, T] = GetParam();
  Random random(4);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), y_steps({B, T, s.d_inner()});
  Random same_a(5), same_b(5);
  const DeltaStateTensors state(same_a, s, B), stepped(same_b, s, B);
  delta_scan(ctx,
             {.shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()});
  for (int64_t t = 0; t < T; ++t) {
    delta_step(ctx, {.shape = s,
                     .params = params.views(),
                     .proj = proj.view().select(1, t),
                     .y = y_steps.view().select(1, t),
                     .state = stepped.views()});
  }
  EXPECT_TRUE(near(y_steps, y.values(), twice(delta_tolerance(s, T))));
  for (int64_t b = 0; b < B; ++b) {
    expect_state(stepped, b, values_of(state.row(b)), twice(delta_tolerance(s, T)));
  }
}

TEST_P(DeltaScan, TwoScansEqualOne) {
  const auto& [name, s, B, T] = GetParam();
  Random random(6);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), y_parts({B, T, s.d_inner()});
  Random same_a(7), same_b(7);
  const DeltaStateTensors state(same_a, s, B), parts(same_b, s, B);
  delta_scan(ctx,
             {.shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()});
  for (const auto& [from, to] : {std::pair{int64_t{0}, T / 3}, std::pair{T / 3, T}}) {
    delta_scan(ctx, {.shape = s,
                     .params = params.views(),
                     .proj = proj.view().slice(1, from, to),
                     .y = y_parts.view().slice(1, from, to),
                     .state = parts.views()});
  }
  EXPECT_TRUE(near(y_parts, y.values(), twice(delta_tolerance(s, T))));
  for (int64_t b = 0; b < B; ++b) {
    expect_state(parts, b, values_of(state.row(b)), twice(delta_tolerance(s, T)));
  }
}

TEST_P(DeltaScan, AnyChunkSizeGivesTheSame) {
  const auto& [name, s, B, T] = GetParam();
  Random random(8);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()});
  delta_scan(ctx, {.shape = s, .params = params.views(), .proj = proj, .y = y});
  for (const int64_t chunk : {1, 3, 16, 100}) {
    const Tensor other({B, T, s.d_inner()});
    delta_scan(ctx,
               {.shape = s, .params = params.views(), .proj = proj, .y = other, .chunk = chunk});
    EXPECT_TRUE(near(other, y.values(), twice(delta_tolerance(s, T)))) << "chunk " << chunk;
  }
}

TEST_P(DeltaScan, PackedSequencesEqualSeparateOnes) {
  const auto& [name, s, B, T] = GetParam();
  Random random(9);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const int32_t cut = static_cast<int32_t>(T / 4), end = static_cast<int32_t>(T);
  const Tensor cu = Tensor::of_ids({0, cut, cut, end});  // the middle one is empty
  const Tensor y({1, T, s.d_inner()}), separate({1, T, s.d_inner()});
  Random same_a(10), same_b(10);
  const DeltaStateTensors packed(same_a, s, 3), alone(same_b, s, 3);
  delta_scan(ctx, {.shape = s,
                   .params = params.views(),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = cu,
                   .state = packed.views()});
  for (int i = 0; i < 3; ++i) {
    const int64_t from = std::vector{0, cut, cut}[static_cast<size_t>(i)];
    const int64_t to = std::vector{cut, cut, end}[static_cast<size_t>(i)];
    if (from == to) continue;
    DeltaState state = alone.views();
    state.rows = state.rows.slice(0, i, i + 1);
    delta_scan(ctx, {.shape = s,
                     .params = params.views(),
                     .proj = proj.view().slice(1, from, to),
                     .y = separate.view().slice(1, from, to),
                     .state = state});
  }
  EXPECT_TRUE(same_bits(y, separate));
  EXPECT_TRUE(same_bits(packed.delta, alone.delta));
}

TEST_P(DeltaScan, ABatchRowEqualsThatRowAloneOnAnyNumberOfThreads) {
  const auto& [name, s, B, T] = GetParam();
  Random random(11);
  Context two = make_context(2), three = make_context(3);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), alone({1, T, s.d_inner()});
  delta_scan(two, {.shape = s, .params = params.views(), .proj = proj, .y = y});
  delta_scan(
      three,
      {.shape = s, .params = params.views(), .proj = proj.view().slice(0, B - 1, B), .y = alone});
  EXPECT_TRUE(same_bits(alone, y.view().slice(0, B - 1, B)));
}

// A scan from zero, its gradients, and y dotted with fixed weights as a function of proj and the
// parameters in one vector, so that one complex step serves for every input.
struct Problem {
  DeltaCase row;
  Random random;
  DeltaParamTensors params;
  Tensor proj, d_y;

  struct Gradients {
    DeltaParamTensors params;
    Tensor proj;

    std::vector<double> all() const {
      std::vector<double> values = proj.values();
      for (const Tensor* tensor : {&params.A_log, &params.dt_bias, &params.norm}) {
        const auto more = tensor->values();
        values.insert(values.end(), more.begin(), more.end());
      }
      return values;
    }
  };

  Problem(const DeltaCase& delta_case, uint64_t seed, DType dtype = DType::f32)
      : row(delta_case),
        random(seed),
        params(random, row.shape),
        proj(Tensor::normal(random, {row.B, row.T, row.shape.d_proj()}, 1, dtype, 3)),
        d_y(Tensor::normal(random, {row.B, row.T, row.shape.d_inner()}, 1, dtype, 2)) {}

  std::vector<double> point() const {
    std::vector<double> values = proj.values();
    for (const Tensor* tensor : {&params.A_log, &params.dt_bias, &params.norm}) {
      const auto more = tensor->values();
      values.insert(values.end(), more.begin(), more.end());
    }
    return values;
  }

  template <typename T>
  T loss(const std::vector<T>& values) const {
    const DeltaShape& s = row.shape;
    const T* at = values.data();
    const auto take = [&](int64_t n) {
      at += n;
      return std::vector<T>(at - n, at);
    };
    const int64_t size = row.T * s.d_inner();
    const auto inputs = take(row.B * row.T * s.d_proj());
    ref::DeltaParams<T> p;
    p.A_log = take(s.H), p.dt_bias = take(s.H), p.norm = take(s.V);
    T sum(0);
    const auto weights = d_y.values();
    for (int64_t b = 0; b < row.B; ++b) {
      std::vector<T> state(static_cast<size_t>(s.H * s.V * s.K), T(0));
      std::vector<T> y(static_cast<size_t>(size));
      ref::delta_scan(s, p, inputs.data() + b * row.T * s.d_proj(), row.T, state, y.data());
      const auto of_row = std::span(weights).subspan(static_cast<size_t>(b * size));
      sum += dot(of_row.first(static_cast<size_t>(size)), y);
    }
    return sum;
  }

  Gradients gradients(Context& ctx, int64_t chunk = 0) const {
    Gradients d{DeltaParamTensors(row.shape),
                Tensor({row.B, row.T, row.shape.d_proj()}, proj.host().dtype, 4)};
    backward(ctx, d, chunk);
    return d;
  }
  void backward(Context& ctx, const Gradients& d, int64_t chunk = 0) const {
    delta_scan_backward(ctx, {.shape = row.shape,
                              .params = params.views(),
                              .proj = proj,
                              .d_y = d_y,
                              .d_proj = d.proj,
                              .d_params = d.params.views(),
                              .chunk = chunk});
  }
};

class DeltaScanBackward : public ::testing::TestWithParam<DeltaCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, DeltaScanBackward, ::testing::ValuesIn(delta_cases()),
                         [](const auto& row) { return row.param.name; });

// Every element of every gradient, at a size where that is quick.
TEST_P(DeltaScanBackward, EqualsTheComplexStepEverywhere) {
  DeltaCase row = GetParam();
  row.B = std::min<int64_t>(row.B, 2);
  row.shape.H = std::min<int64_t>(row.shape.H, 2);
  row.shape.K = std::min<int64_t>(row.shape.K, 8);
  row.shape.V = std::min<int64_t>(row.shape.V, 7);
  row.T = std::min<int64_t>(row.T, 11);
  for (const DType dtype : test_dtypes()) {
    const Problem problem(row, 20, dtype);
    const auto want = complex_step([&](const auto& x) { return problem.loss(x); }, problem.point());
    Context ctx = make_context(2);
    for (const int64_t chunk : {4, 0}) {
      const auto d = problem.gradients(ctx, chunk);
      const size_t proj = d.proj.values().size();
      const auto params_want = std::span(want).subspan(proj);
      const size_t H = static_cast<size_t>(row.shape.H);
      const Tolerance bound{.unit = 3e-6, .terms = 64};
      EXPECT_TRUE(near(d.proj, std::span(want).first(proj), rounded(bound, dtype)));
      EXPECT_TRUE(near(d.params.A_log, params_want.first(H), bound));
      EXPECT_TRUE(near(d.params.dt_bias, params_want.subspan(H, H), bound));
      EXPECT_TRUE(near(d.params.norm, params_want.subspan(2 * H), bound));
    }
  }
}

// Directional derivatives at the real sizes: a wrong part anywhere shows in a random direction.
TEST_P(DeltaScanBackward, EqualsTheComplexStepInRandomDirections) {
  for (const DType dtype : test_dtypes()) {
    const Problem problem(GetParam(), 21, dtype);
    Context ctx = make_context(2);
    for_each_instruction_set([&] {
      const auto point = problem.point(), gradient = problem.gradients(ctx).all();
      Random random(22);
      double norm = 0;
      for (const double g : gradient) norm += g * g;
      for (int direction = 0; direction < 3; ++direction) {
        auto stepped = to_complex(point);
        double got = 0;
        for (size_t i = 0; i < point.size(); ++i) {
          const double along = random.normal();
          stepped[i].imag(along * ref::kComplexStep);
          got += gradient[i] * along;
        }
        const double want = std::imag(problem.loss(stepped)) / ref::kComplexStep;
        const double unit = dtype == DType::f32 ? 1e-5 : unit_of(dtype);
        EXPECT_NEAR(got, want, unit * std::sqrt(norm));
      }
    });
  }
}

TEST_P(DeltaScanBackward, GivesTheSameBitsOnAnyNumberOfThreads) {
  const Problem problem(GetParam(), 23);
  Context one = make_context(1), three = make_context(3);
  EXPECT_EQ(problem.gradients(one).all(), problem.gradients(three).all());
}

TEST_P(DeltaScanBackward, AnyChunkSizeGivesTheSame) {
  const Problem problem(GetParam(), 24);
  Context ctx = make_context(2);
  const auto want = problem.gradients(ctx);
  const Tolerance bound{.unit = 6e-6, .terms = static_cast<double>(problem.row.T + 64)};
  for (const int64_t chunk : {1, 5, 16, 100}) {
    const auto d = problem.gradients(ctx, chunk);
    EXPECT_TRUE(near(d.proj, want.proj.values(), bound)) << "chunk " << chunk;
    EXPECT_TRUE(near(d.params.A_log, want.params.A_log.values(), bound)) << "chunk " << chunk;
    EXPECT_TRUE(near(d.params.norm, want.params.norm.values(), bound)) << "chunk " << chunk;
  }
}

TEST(DeltaScanBackwardParams, AreAddedTo) {
  const Problem problem(delta_cases().front(), 25);
  Context ctx = make_context(2);
  const auto once = problem.gradients(ctx), twice_over = problem.gradients(ctx);
  problem.backward(ctx, twice_over);
  const auto doubled = [](const Tensor& tensor) {
    auto values = tensor.values();
    for (double& value : values) value *= 2;
    return values;
  };
  const Tolerance bound{.unit = 1e-6};
  EXPECT_TRUE(same_bits(twice_over.proj, once.proj));
  EXPECT_TRUE(near(twice_over.params.A_log, doubled(once.params.A_log), bound));
  EXPECT_TRUE(near(twice_over.params.dt_bias, doubled(once.params.dt_bias), bound));
  EXPECT_TRUE(near(twice_over.params.norm, doubled(once.params.norm), bound));
}

TEST(DeltaScanBackwardPacked, EqualsTheSequencesApart) {
  const DeltaShape s = delta_cases().front().shape;
  Random random(26);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s);
  std::vector<int32_t> cuts = {0};
  for (int i = 0; i < 20; ++i) {
    cuts.push_back(cuts.back() + static_cast<int32_t>(random.integer(0, 40)));
  }
  cuts.push_back(cuts.back());  // the last one is empty
  const int64_t T = cuts.back();
  Tensor cu({static_cast<int64_t>(cuts.size())}, DType::i32);
  for (size_t i = 0; i < cuts.size(); ++i) cu.set(static_cast<int64_t>(i), cuts[i]);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const Tensor d_y = Tensor::normal(random, {1, T, s.d_inner()});
  const Tensor packed({1, T, s.d_proj()}), apart({1, T, s.d_proj()});
  const DeltaParamTensors d_packed(s), d_apart(s);
  delta_scan_backward(ctx, {.shape = s,
                            .params = params.views(),
                            .proj = proj,
                            .cu_seqlens = cu,
                            .d_y = d_y,
                            .d_proj = packed,
                            .d_params = d_packed.views()});
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    if (cuts[i] == cuts[i + 1]) continue;
    const auto part = [&](const Tensor& tensor) {
      return tensor.view().slice(1, cuts[i], cuts[i + 1]);
    };
    delta_scan_backward(ctx, {.shape = s,
                              .params = params.views(),
                              .proj = part(proj),
                              .d_y = part(d_y),
                              .d_proj = part(apart),
                              .d_params = d_apart.views()});
  }
  EXPECT_TRUE(near(packed, apart.values(), {.unit = 1e-6}));
  EXPECT_TRUE(near(d_packed.A_log, d_apart.A_log.values(), {.unit = 1e-6, .terms = 100}));
  EXPECT_TRUE(near(d_packed.dt_bias, d_apart.dt_bias.values(), {.unit = 1e-6, .terms = 100}));
  EXPECT_TRUE(near(d_packed.norm, d_apart.norm.values(), {.unit = 1e-6, .terms = 100}));
}

// Decays from none to total, which overflow if exp(c_t) and exp(-c_s) are formed apart, and betas
// from none to all that there is.
struct ExtremeProblem : Problem {
  explicit ExtremeProblem(bool negative)
      : Problem({.shape = {.H = 6, .K = 16, .V = 16, .negative = negative}, .B = 1, .T = 100}, 30) {
    const DeltaShape& s = row.shape;
    for (int64_t h = 0; h < s.H; ++h) {
      const double log_rate[] = {5, -12, 0, 4, 0, -12}, a[] = {300, -8, 0, -3, 0, -8};
      const double b[] = {0, 0, 20, 2, -20, 30};
      params.A_log.set(h, log_rate[h]);
      for (int64_t t = 0; t < row.T; ++t) {
        const int64_t at = t * s.d_proj() + h;
        proj.set(at + s.b(), b[h] + random.uniform());
        proj.set(at + s.a(), a[h] + random.uniform());
      }
    }
  }
};

TEST(DeltaScanExtremes, OfDecayAndBetaEqualTheReference) {
  for (const bool negative : {false, true}) {
    const ExtremeProblem problem(negative);
    const DeltaShape& s = problem.row.shape;
    Context ctx = make_context(2);
    const Tensor y({1, problem.row.T, s.d_inner()});
    delta_scan(ctx, {.shape = s, .params = problem.params.views(), .proj = problem.proj, .y = y});
    std::vector<std::vector<double>> states(
        1, std::vector<double>(static_cast<size_t>(s.H * s.V * s.K)));
    const auto want = reference_scan(s, problem.params, problem.proj, states);
    EXPECT_TRUE(near(y, want, delta_tolerance(s, problem.row.T)));
  }
}

TEST(DeltaScanExtremes, GradientsAreFiniteAndEqualTheComplexStep) {
  for (const bool negative : {false, true}) {
    const ExtremeProblem problem(negative);
    Context ctx = make_context(2);
    const auto d = problem.gradients(ctx);
    const auto gradient = d.all();
    Random random(31);
    const auto positions = some_positions(random, static_cast<int64_t>(gradient.size()), 200);
    const auto want =
        complex_step([&](const auto& x) { return problem.loss(x); }, problem.point(), positions);
    const Tensor got = Tensor::of({static_cast<int64_t>(gradient.size())}, gradient);
    EXPECT_TRUE(near(gather(got, positions), want, {.unit = 4e-6, .terms = 100}));
    // Where nothing of the state is left, its decay has no gradient, not even one of roundings.
    EXPECT_EQ(d.params.A_log.at(0), 0);
  }
}

TEST(DeltaScanNaN, StaysInItsSequence) {
  const DeltaShape s{.H = 1, .K = 8, .V = 8};
  Random random(32);
  Context ctx = make_context(1);
  const DeltaParamTensors params(random, s);
  Tensor proj = Tensor::normal(random, {2, 40, s.d_proj()});
  proj.set(20 * s.d_proj() + s.v(), std::nan(""));
  const Tensor y({2, 40, s.d_inner()});
  delta_scan(ctx, {.shape = s, .params = params.views(), .proj = proj, .y = y});
  EXPECT_FALSE(std::isnan(y.at(0)));
  EXPECT_TRUE(std::isnan(y.at(39 * s.d_inner())));
  EXPECT_FALSE(std::isnan(y.at(79 * s.d_inner())));
}

TEST(DeltaScanBlocks, AreAsManyAsKeepTheirScratchWithinBounds) {
  EXPECT_EQ(delta_scan_blocks(512, 1000), 512);
  EXPECT_EQ(delta_scan_blocks(512, int64_t{1} << 20), 128);
  EXPECT_EQ(delta_scan_blocks(512, int64_t{1} << 40), 1);
  EXPECT_EQ(delta_scan_blocks(512, 0), 512);
  EXPECT_EQ(delta_scan_blocks(0, 1000), 0);
}

// On the GPU a block takes more than one head of a sequence.
TEST(DeltaScanBlocks, MoreSequencesThanBlocksEqualThemAlone) {
  const DeltaShape s{.H = 2, .K = 200, .V = 256};
  const int64_t B = 40, T = 1000;
  Random random(33);
  Context ctx = make_context(2);
  const DeltaParamTensors params(random, s), d_params(s), d_params_alone(s);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const Tensor d_y = Tensor::normal(random, {1, T, s.d_inner()});
  // Sequences of one token, but for the last: the scratch is for the longest that there may be.
  std::vector<int32_t> cuts;
  for (int32_t i = 0; i < B; ++i) cuts.push_back(i);
  cuts.push_back(static_cast<int32_t>(T));
  Tensor cu({B + 1}, DType::i32);
  for (size_t i = 0; i < cuts.size(); ++i) cu.set(static_cast<int64_t>(i), cuts[i]);
  const Tensor d_proj({1, T, s.d_proj()}), alone({1, T, s.d_proj()});
  delta_scan_backward(ctx, {.shape = s,
                            .params = params.views(),
                            .proj = proj,
                            .cu_seqlens = cu,
                            .d_y = d_y,
                            .d_proj = d_proj,
                            .d_params = d_params.views()});
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const auto part = [&](const Tensor& tensor) {
      return tensor.view().slice(1, cuts[i], cuts[i + 1]);
    };
    delta_scan_backward(ctx, {.shape = s,
                              .params = params.views(),
                              .proj = part(proj),
                              .d_y = part(d_y),
                              .d_proj = part(alone),
                              .d_params = d_params_alone.views()});
  }
  EXPECT_TRUE(near(d_proj, alone.values(), {.unit = 1e-6}));
  EXPECT_TRUE(near(d_params.norm, d_params_alone.norm.values(), {.unit = 1e-6, .terms = 100}));
}

TEST(DeltaScanSteadyState, ASecondCallAllocatesNothing) {
  const Problem problem(delta_cases().front(), 34);
  const DeltaShape& s = problem.row.shape;
  Context ctx = make_context(2);
  const Tensor y({problem.row.B, problem.row.T, s.d_inner()});
  const DeltaScanArgs args{
      .shape = s, .params = problem.params.views(), .proj = problem.proj, .y = y};
  delta_scan(ctx, args);
  problem.gradients(ctx);
  const int64_t before = ctx.scratch.allocations();
  delta_scan(ctx, args);
  problem.gradients(ctx);
  EXPECT_EQ(ctx.scratch.allocations(), before);
}

TEST(DeltaScanErrors, NameTheArgument) {
  const DeltaShape s{.H = 2, .K = 3, .V = 4};
  Context ctx = make_context(1);
  const DeltaParamTensors params(s);
  const Tensor proj = Tensor::zeros({1, 5, s.d_proj()}), y({1, 5, s.d_inner()});
  Random random(35);
  const DeltaStateTensors state(random, s, 1);
  const DeltaScanArgs good{
      .shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()};
  const auto forward = [&](auto change) {
    DeltaScanArgs args = good;
    change(args);
    return input_error_of([&] { delta_scan(ctx, args); });
  };
  EXPECT_EQ(forward([](auto&) {}), "nothing thrown");
  EXPECT_EQ(forward([](auto& args) { args.shape.K = 0; }),
            "[delta_scan] H, K and V must be positive");
  EXPECT_EQ(forward([](auto& args) { args.shape.V = 1025; }),
            "[delta_scan] K and V must be at most 1024");
  EXPECT_EQ(forward([](auto& args) { args.params.A_log = {}; }), "[delta_scan] A_log is missing");
  EXPECT_EQ(forward([](auto& args) { args.params.dt_bias = {}; }),
            "[delta_scan] dt_bias is missing");
  EXPECT_EQ(forward([](auto& args) { args.params.norm = args.params.A_log; }),
            "[delta_scan] dim 0 of norm: got 2, want 4");
  EXPECT_EQ(forward([](auto& args) { args.proj = args.proj.slice(2, 0, 30); }),
            "[delta_scan] dim 2 of proj: got 30, want 32");
  EXPECT_EQ(forward([](auto& args) { args.y = args.y.slice(1, 0, 4); }),
            "[delta_scan] dim 1 of y: got 4, want 5");
  EXPECT_EQ(forward([&](auto& args) { args.y = proj.view().slice(2, 0, 8); }),
            "[delta_scan] y and proj must not share memory");
  EXPECT_EQ(forward([](auto& args) { args.state.delta = args.state.delta.slice(1, 0, 1); }),
            "[delta_scan] dim 1 of state.delta: got 1, want 2");
  EXPECT_EQ(forward([](auto& args) { args.state.rows = {}; }),
            "[delta_scan] state.rows is missing");
  EXPECT_EQ(forward([](auto& args) { args.chunk = -1; }),
            "[delta_scan] chunk must not be negative");

  const Tensor d_proj({1, 5, s.d_proj()});
  const DeltaParamTensors d_params(s);
  const DeltaScanBackwardArgs good_back{.shape = s,
                                        .params = params.views(),
                                        .proj = proj,
                                        .d_y = y,
                                        .d_proj = d_proj,
                                        .d_params = d_params.views()};
  const auto backward = [&](auto change) {
    DeltaScanBackwardArgs args = good_back;
    change(args);
    return input_error_of([&] { delta_scan_backward(ctx, args); });
  };
  EXPECT_EQ(backward([](auto&) {}), "nothing thrown");
  EXPECT_EQ(backward([](auto& args) { args.d_y = {}; }), "[delta_scan_backward] d_y is missing");
  EXPECT_EQ(backward([](auto& args) { args.d_params.norm = {}; }),
            "[delta_scan_backward] norm is missing");
  EXPECT_EQ(backward([](auto& args) { args.d_proj = args.proj; }),
            "[delta_scan_backward] d_proj and proj must not share memory");
  EXPECT_EQ(backward([](auto& args) { args.d_y = args.d_proj.slice(2, 0, 8); }),
            "[delta_scan_backward] d_proj and d_y must not share memory");
  EXPECT_EQ(backward([](auto& args) { args.chunk = -1; }),
            "[delta_scan_backward] chunk must not be negative");
}

}  // namespace
}  // namespace mamba3::testing
