// A step at the sizes of published models, which have kernels of their own on the GPU
// (cuda/mixer_step_head.cuh). mixer_scan_test.cc has the other sizes.

#include "ops/mixer_step.h"

#include "support/compare.h"
#include "support/device.h"
#include "support/mixer.h"

namespace mamba3::testing {
namespace {

// The table of the benchmarks, and what these kernels tell apart: the rank, the dtypes, groups, the
// norm, angles, and how many blocks have a head (of an H100: four up to 33 heads of all sequences,
// two up to 66, one for more, and one where there is a norm).
std::vector<MixerCase> step_cases() {
  std::vector<MixerCase> cases = bench::mixer_step_cases();
  const auto add = [&](const std::string& name, int64_t B, auto change) {
    MixerCase row{.T = 1};
    row.name = name, row.B = B;
    change(row.shape);
    cases.push_back(row);
  };
  const auto mimo = [](MixerShape& s) { s.R = 4, s.mimo = true, s.rope_pairs = RopePairs::halves; };
  add("one_head", 1, [](MixerShape& s) { s.H = 1; });
  add("H4_B12", 12, [](MixerShape& s) { s.H = 4; });
  add("B8_G2_out_norm", 8, [](MixerShape& s) { s.G = 2, s.out_norm = true; });
  add("rope_all", 1, [](MixerShape& s) { s.S = s.N / 2; });
  add("rope_none", 2, [](MixerShape& s) { s.S = 0; });
  add("softplus_A_floor", 1,
      [](MixerShape& s) { s.decay_act = DecayAct::softplus, s.A_floor = 0.5f; });
  add("mimo_R1", 1, [&](MixerShape& s) { mimo(s), s.R = 1; });
  add("mimo_R4_H40", 1, [&](MixerShape& s) { mimo(s), s.H = 40; });
  add("mimo_R4_B8", 8, [&](MixerShape& s) { mimo(s); });
  add("mimo_R4_G2_out_norm", 2, [&](MixerShape& s) { mimo(s), s.G = 2, s.out_norm = true; });
  add("mimo_R4_neighbours_rope_all", 1,
      [&](MixerShape& s) { mimo(s), s.rope_pairs = RopePairs::neighbours, s.S = s.N / 2; });
  return cases;
}

// Elements behind a row of proj: so that rows begin at multiples of 8, of which the kernels of
// these sizes ask for 4, and so that every other row begins at an odd element, which they do not
// take. Never none, so that what is written or read behind a row shows.
int64_t aligned_gap(const MixerShape& s) {
  return 8 + (8 - s.d_proj() % 8) % 8;
}
int64_t odd_gap(const MixerShape& s) {
  return 5 + s.d_proj() % 2;
}

class MixerStep : public ::testing::TestWithParam<MixerCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, MixerStep, ::testing::ValuesIn(step_cases()),
                         [](const auto& row) { return row.param.name; });

TEST_P(MixerStep, EqualsTheReference) {
  const auto& [name, s, B, T] = GetParam();
  for (const DType dtype : test_dtypes()) {
    for (const DType ssm_dtype : test_dtypes()) {
      // The second where there is more than one row: the kernels that take every shape.
      for (const bool aligned : {true, false}) {
        if (!aligned && ssm_dtype != dtype) continue;
        const int64_t gap = aligned ? aligned_gap(s) : odd_gap(s);
        SCOPED_TRACE(fmt::format("{}, state {}, gap {}", name_of(dtype), name_of(ssm_dtype), gap));
        Random random(1);
        Context ctx = make_context(2);
        const MixerParamTensors params(random, s);
        const Tensor proj = Tensor::normal(random, {B, 1, s.d_proj()}, 1, dtype, gap);
        const Tensor y({B, 1, s.d_inner()}, dtype, gap);
        const MixerStateTensors state(random, s, B, 1, ssm_dtype);
        auto states = reference_states(state, B);
        const auto want = reference_scan(s, params, proj, states);
        mixer_step(ctx, {.shape = s,
                         .params = params.views(s),
                         .proj = proj.view().select(1, 0),
                         .y = y.view().select(1, 0),
                         .state = state.views()});
        EXPECT_TRUE(near(y, want, rounded(scan_tolerance(s, 1), dtype)));
        for (int64_t b = 0; b < B; ++b) {
          expect_state(state, b, states[static_cast<size_t>(b)], scan_tolerance(s, 1));
        }
      }
    }
  }
}

// Steps in a row without a wait, each of which reads what the one before wrote, and of which the
// blocks of a head overwrite what all of them read.
TEST_P(MixerStep, ManyStepsEqualTheReference) {
  const auto& [name, s, B, T] = GetParam();
  constexpr int64_t kSteps = 8;
  Random random(2);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj =
      Tensor::normal(random, {B, kSteps, s.d_proj()}, 1, DType::f32, aligned_gap(s));
  const Tensor y({B, kSteps, s.d_inner()});
  const MixerStateTensors state(random, s, B);
  auto states = reference_states(state, B);
  const auto want = reference_scan(s, params, proj, states);
  const View inputs = proj.view(), outputs = y.view();
  for (int64_t t = 0; t < kSteps; ++t) {
    mixer_step(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = inputs.select(1, t),
                     .y = outputs.select(1, t),
                     .state = state.views()});
  }
  EXPECT_TRUE(near(y, want, scan_tolerance(s, kSteps)));
  for (int64_t b = 0; b < B; ++b) {
    expect_state(state, b, states[static_cast<size_t>(b)], scan_tolerance(s, kSteps));
  }
}

// Few sequences may have several blocks a head, and many one.
TEST_P(MixerStep, ASequenceEqualsItAmongMany) {
  const auto& [name, s, B, T] = GetParam();
  constexpr int64_t kSequences = 6;
  Random random(3);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj =
      Tensor::normal(random, {kSequences, s.d_proj()}, 1, DType::f32, aligned_gap(s));
  const Tensor y({kSequences, s.d_inner()}), alone({1, s.d_inner()});
  Random same_a(4), same_b(4);
  const MixerStateTensors state(same_a, s, kSequences), other(same_b, s, kSequences);
  mixer_step(ctx,
             {.shape = s, .params = params.views(s), .proj = proj, .y = y, .state = state.views()});
  MixerState one = other.views();
  one.rows = one.rows.slice(0, 5, 6);
  mixer_step(ctx, {.shape = s,
                   .params = params.views(s),
                   .proj = proj.view().slice(0, 5, 6),
                   .y = alone,
                   .state = one});
  EXPECT_TRUE(near(alone, values_of(y.view().slice(0, 5, 6)), {.unit = 2e-6, .terms = 128}));
  expect_state(other, 5, state.reference<double>(5), scan_tolerance(s, 1));
}

}  // namespace
}  // namespace mamba3::testing
