#include "ops/delta_step.h"

#include "support/compare.h"
#include "support/delta.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

class DeltaStep : public ::testing::TestWithParam<DeltaCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, DeltaStep, ::testing::ValuesIn(delta_cases()),
                         [](const auto& row) { return row.param.name; });

TEST_P(DeltaStep, EqualsTheReference) {
  const auto& [name, s, B, T] = GetParam();
  for (const DType dtype : test_dtypes()) {
    Random random(1);
    Context ctx = make_context(2);
    const DeltaParamTensors params(random, s);
    const Tensor proj = Tensor::normal(random, {B, 1, s.d_proj()}, 1, dtype, 5);
    for_each_instruction_set([&, &s = s, B = B] {
      const Tensor y({B, 1, s.d_inner()}, dtype, 3);
      Random again(2);
      const DeltaStateTensors state(again, s, B);
      auto states = reference_states(state, B);
      const auto want = reference_scan(s, params, proj, states);
      delta_step(ctx, {.shape = s,
                       .params = params.views(),
                       .proj = proj.view().select(1, 0),
                       .y = y.view().select(1, 0),
                       .state = state.views()});
      EXPECT_TRUE(near(y, want, rounded(delta_tolerance(s, 1), dtype)));
      for (int64_t b = 0; b < B; ++b) {
        expect_state(state, b, states[static_cast<size_t>(b)], delta_tolerance(s, 1));
      }
    });
  }
}

TEST_P(DeltaStep, ASequenceEqualsItAmongManyOnAnyNumberOfThreads) {
  const auto& [name, s, B, T] = GetParam();
  constexpr int64_t kSequences = 6;
  Random random(3);
  Context one = make_context(1), three = make_context(3);
  const DeltaParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {kSequences, s.d_proj()});
  const Tensor y({kSequences, s.d_inner()}), alone({1, s.d_inner()});
  Random same_a(4), same_b(4);
  const DeltaStateTensors state(same_a, s, kSequences), other(same_b, s, kSequences);
  delta_step(three,
             {.shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()});
  DeltaState last = other.views();
  last.rows = last.rows.slice(0, 5, 6);
  delta_step(one, {.shape = s,
                   .params = params.views(),
                   .proj = proj.view().slice(0, 5, 6),
                   .y = alone,
                   .state = last});
  EXPECT_TRUE(same_bits(alone, y.view().slice(0, 5, 6)));
  EXPECT_TRUE(same_bits(other.row(5), state.row(5)));
}

TEST(DeltaStepErrors, NameTheArgument) {
  const DeltaShape s{.H = 2, .K = 3, .V = 4};
  Context ctx = make_context(1);
  const DeltaParamTensors params(s);
  const Tensor proj = Tensor::zeros({1, s.d_proj()}), y({1, s.d_inner()});
  Random random(5);
  const DeltaStateTensors state(random, s, 1);
  const DeltaStepArgs good{
      .shape = s, .params = params.views(), .proj = proj, .y = y, .state = state.views()};
  const auto step = [&](auto change) {
    DeltaStepArgs args = good;
    change(args);
    return input_error_of([&] { delta_step(ctx, args); });
  };
  EXPECT_EQ(step([](auto&) {}), "nothing thrown");
  EXPECT_EQ(step([](auto& args) { args.shape.H = 0; }), "[delta_step] H, K and V must be positive");
  EXPECT_EQ(step([](auto& args) { args.params.norm = {}; }), "[delta_step] norm is missing");
  EXPECT_EQ(step([](auto& args) { args.proj = args.proj.slice(1, 0, 30); }),
            "[delta_step] dim 1 of proj: got 30, want 32");
  EXPECT_EQ(step([&](auto& args) { args.y = proj.view().slice(1, 0, 8); }),
            "[delta_step] y and proj must not share memory");
  EXPECT_EQ(step([](auto& args) { args.state = {}; }), "[delta_step] state.delta is missing");
}

}  // namespace
}  // namespace mamba3::testing
