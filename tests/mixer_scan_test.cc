#include "ops/mixer_scan.h"

#include <cmath>

#include "ops/mixer_step.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/mixer.h"

namespace mamba3::testing {
namespace {

// Between two results that are both rounded.
Tolerance twice(Tolerance tolerance) {
  tolerance.unit *= 2;
  return tolerance;
}

class MixerScan : public ::testing::TestWithParam<ScheduledCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, MixerScan,
                         ::testing::ValuesIn(scheduled_cases(MixerSchedule::best)),
                         [](const auto& row) { return row.param.row.name; });
INSTANTIATE_TEST_SUITE_P(Walk, MixerScan, ::testing::ValuesIn(scheduled_cases(MixerSchedule::walk)),
                         [](const auto& row) { return row.param.row.name; });

TEST_P(MixerScan, EqualsTheReference) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  for (const DType dtype : test_dtypes()) {
    for (const DType ssm_dtype : test_dtypes()) {
      Random random(1);
      Context ctx = make_context(2);
      const MixerParamTensors params(random, s);
      const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()}, 1, dtype, 5);
      const Tensor y({B, T, s.d_inner()}, dtype);
      const MixerStateTensors state(random, s, B, 1, ssm_dtype);
      auto states = reference_states(state, B);
      const auto want = reference_scan(s, params, proj, states);
      mixer_scan(ctx, {.shape = s,
                       .params = params.views(s),
                       .proj = proj,
                       .y = y,
                       .cu_seqlens = {},
                       .state = state.views(),
                       .schedule = schedule});
      EXPECT_TRUE(near(y, want, rounded(scan_tolerance(s, T), dtype)));
      for (int64_t b = 0; b < B; ++b) {
        expect_state(state, b, states[static_cast<size_t>(b)], scan_tolerance(s, T));
      }
    }
  }
}

// One token at a time, where a state of bf16 is rounded at every step; so only one step.
TEST_P(MixerScan, AStepEqualsTheReference) {
  const auto& [name, s, B, T] = GetParam().row;
  for (const DType dtype : test_dtypes()) {
    for (const DType ssm_dtype : test_dtypes()) {
      Random random(12);
      Context ctx = make_context(2);
      const MixerParamTensors params(random, s);
      const Tensor proj = Tensor::normal(random, {B, 1, s.d_proj()}, 1, dtype, 5);
      const Tensor y({B, 1, s.d_inner()}, dtype);
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

TEST_P(MixerScan, StepsEqualOneScan) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  Random random(2);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), y_steps({B, T, s.d_inner()});
  Random same_a(3), same_b(3);
  const MixerStateTensors state(same_a, s, B), stepped(same_b, s, B);
  mixer_scan(ctx, {.shape = s,
                   .params = params.views(s),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = {},
                   .state = state.views(),
                   .schedule = schedule});
  for (int64_t t = 0; t < T; ++t) {
    mixer_step(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj.view().select(1, t),
                     .y = y_steps.view().select(1, t),
                     .state = stepped.views()});
  }
  EXPECT_TRUE(near(y_steps, y.values(), twice(scan_tolerance(s, T))));
  for (int64_t b = 0; b < B; ++b)
    expect_state(stepped, b, state.reference<double>(b), twice(scan_tolerance(s, T)));
}

TEST_P(MixerScan, TwoScansEqualOne) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  const int64_t T1 = T / 3;
  Random random(4);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), y_parts({B, T, s.d_inner()});
  Random same_a(5), same_b(5);
  const MixerStateTensors state(same_a, s, B), parts(same_b, s, B);
  mixer_scan(ctx, {.shape = s,
                   .params = params.views(s),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = {},
                   .state = state.views(),
                   .schedule = schedule});
  for (const auto& [from, to] : {std::pair{int64_t{0}, T1}, std::pair{T1, T}}) {
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj.view().slice(1, from, to),
                     .y = y_parts.view().slice(1, from, to),
                     .cu_seqlens = {},
                     .state = parts.views(),
                     .schedule = schedule});
  }
  EXPECT_TRUE(near(y_parts, y.values(), twice(scan_tolerance(s, T))));
  for (int64_t b = 0; b < B; ++b)
    expect_state(parts, b, state.reference<double>(b), twice(scan_tolerance(s, T)));
}

TEST_P(MixerScan, AnyChunkSizeGivesTheSame) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  Random random(6);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()});
  mixer_scan(ctx, {.shape = s,
                   .params = params.views(s),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = {},
                   .state = {},
                   .schedule = schedule});
  for (const int64_t chunk : {1, 3, 16, 100}) {
    const Tensor other({B, T, s.d_inner()});
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj,
                     .y = other,
                     .cu_seqlens = {},
                     .state = {},
                     .chunk = chunk,
                     .schedule = schedule});
    EXPECT_TRUE(near(other, y.values(), twice(scan_tolerance(s, T)))) << "chunk " << chunk;
  }
}

TEST_P(MixerScan, PackedSequencesEqualSeparateOnes) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  Random random(7);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const int32_t cut = static_cast<int32_t>(T / 4), end = static_cast<int32_t>(T);
  const Tensor cu = Tensor::of_ids({0, cut, cut, end});  // the middle one is empty
  const Tensor y({1, T, s.d_inner()}), separate({1, T, s.d_inner()});
  Random same_a(8), same_b(8);
  const MixerStateTensors packed(same_a, s, 3), alone(same_b, s, 3);
  mixer_scan(ctx, {.shape = s,
                   .params = params.views(s),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = cu,
                   .state = packed.views(),
                   .schedule = schedule});
  for (int i = 0; i < 3; ++i) {
    const int64_t from = std::vector{0, cut, cut}[static_cast<size_t>(i)];
    const int64_t to = std::vector{cut, cut, end}[static_cast<size_t>(i)];
    if (from == to) continue;
    MixerState state = alone.views();
    state.rows = state.rows.slice(0, i, i + 1);
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj.view().slice(1, from, to),
                     .y = separate.view().slice(1, from, to),
                     .cu_seqlens = {},
                     .state = state,
                     .schedule = schedule});
  }
  EXPECT_TRUE(same_bits(y, separate));
  EXPECT_TRUE(same_bits(packed.ssm, alone.ssm));
  EXPECT_TRUE(same_bits(packed.angle, alone.angle));
  EXPECT_TRUE(same_bits(packed.k_prev, alone.k_prev));
  EXPECT_TRUE(same_bits(packed.v_prev, alone.v_prev));
}

TEST_P(MixerScan, ABatchRowEqualsThatRowAloneOnAnyNumberOfThreads) {
  const auto& [row, schedule] = GetParam();
  const auto& [name, s, B, T] = row;
  Random random(9);
  Context two = make_context(2), three = make_context(3);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const Tensor y({B, T, s.d_inner()}), alone({1, T, s.d_inner()});
  mixer_scan(two, {.shape = s,
                   .params = params.views(s),
                   .proj = proj,
                   .y = y,
                   .cu_seqlens = {},
                   .state = {},
                   .schedule = schedule});
  mixer_scan(three, {.shape = s,
                     .params = params.views(s),
                     .proj = proj.view().slice(0, B - 1, B),
                     .y = alone,
                     .cu_seqlens = {},
                     .state = {},
                     .schedule = schedule});
  EXPECT_TRUE(same_bits(alone, y.view().slice(0, B - 1, B)));
}

// Decays from none to total, which overflow if exp(c_t) and exp(-c_s) are formed apart.
TEST(MixerScanDecay, StrongAndWeakDecayStayFinite) {
  const MixerShape s{.H = 4, .P = 32, .N = 32, .G = 1, .R = 1, .S = 8};
  Random random(10);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const int64_t T = 200;
  Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < s.H; ++h) {
      const double raw[] = {300, -1e6, 0, 30};
      proj.set(t * s.d_proj() + s.dd_A() + h, raw[h]);
      proj.set(t * s.d_proj() + s.dd_dt() + h, h == 1 ? -9.0 : 5.0);
    }
  }
  auto state = ref::MixerState<double>::zero(s);
  std::vector<double> want(static_cast<size_t>(T * s.d_inner()));
  ref::mixer_scan(s, params.reference<double>(), proj.values().data(), T, state, want.data());
  for (const MixerSchedule schedule : mixer_schedules()) {
    const Tensor y({1, T, s.d_inner()});
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj,
                     .y = y,
                     .cu_seqlens = {},
                     .state = {},
                     .schedule = schedule});
    EXPECT_TRUE(near(y, want, scan_tolerance(s, T)));
  }
}

// On the GPU more chunks than it takes at a time.
TEST(MixerScanSegments, SequencesLongerThanASegmentEqualThoseInLargerChunks) {
  const MixerShape s{.H = 16, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  const int64_t T = 1100;
  EXPECT_LT(2 * mixer_scan_segment(s, 1, false), T);
  Random random(13);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const Tensor cu = Tensor::of_ids({0, 3, 3, 900, 1099, 1100, 1100});
  const Tensor y({1, T, s.d_inner()}), y_large({1, T, s.d_inner()});
  Random same_a(14), same_b(14);
  const MixerStateTensors state(same_a, s, 6), large(same_b, s, 6);
  MixerScanArgs args{.shape = s,
                     .params = params.views(s),
                     .proj = proj,
                     .y = y,
                     .cu_seqlens = cu,
                     .state = state.views(),
                     .chunk = 1};
  mixer_scan(ctx, args);
  args.y = y_large, args.state = large.views(), args.chunk = 64;
  mixer_scan(ctx, args);
  EXPECT_TRUE(near(y, y_large.values(), twice(scan_tolerance(s, T))));
  for (int64_t i = 0; i < 6; ++i) {
    expect_state(state, i, large.reference<double>(i), twice(scan_tolerance(s, T)));
  }
}

TEST(MixerScanSegments, AreAsManyChunksAsAreKeptWithinBounds) {
  MixerShape s{.H = 64, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  for (const bool backward : {false, true}) {
    const int64_t chunks = mixer_scan_segment(s, 64, backward);
    EXPECT_GT(chunks, 8);
    EXPECT_LE(chunks * s.H * s.P * s.N * 4, int64_t{256} << 20);
  }
  EXPECT_LT(mixer_scan_segment(s, 64, true), mixer_scan_segment(s, 64, false));
  s.H = 1 << 20;
  EXPECT_EQ(mixer_scan_segment(s, 64, false), 1);
  s.H = s.P = s.N = 1, s.S = 0;
  EXPECT_LE(mixer_scan_segment(s, 1, false), 65535);  // blocks along y in a grid
}

TEST(MixerScanSegments, ChunksFitTheSequenceAndTheGpu) {
  MixerShape s{.H = 4, .P = 8, .N = 8};
  EXPECT_EQ(mixer_scan_chunk(s, 0, 1000), mixer_scan_chunk(1));
  EXPECT_EQ(mixer_scan_chunk(s, 0, 5), 5);
  EXPECT_EQ(mixer_scan_chunk(s, 0, 0), 1);
  EXPECT_EQ(mixer_scan_chunk(s, 100, 1000), 100);
  EXPECT_EQ(mixer_scan_chunk(s, 1000, 1000), 256);
  s.R = 4;
  EXPECT_EQ(mixer_scan_chunk(s, 1000, 1000), 64);
  s.R = 500;
  EXPECT_EQ(mixer_scan_chunk(s, 3, 1000), 1);
}

// Angles are sums over all tokens.
TEST(MixerScanAngles, HoldOverALongSequence) {
  const MixerShape s{.H = 2, .P = 2, .N = 4, .G = 1, .R = 1, .S = 2};
  const int64_t T = 65536;
  for (const MixerSchedule schedule : mixer_schedules()) {
    Random random(15);
    Context ctx = make_context(2);
    const MixerParamTensors params(random, s);
    const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
    const Tensor y({1, T, s.d_inner()});
    const MixerStateTensors state(random, s, 1);
    auto states = reference_states(state, 1);
    reference_scan(s, params, proj, states);
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj,
                     .y = y,
                     .cu_seqlens = {},
                     .state = state.views(),
                     .schedule = schedule});
    const auto angle = values_of(state.angle);
    for (size_t i = 0; i < angle.size(); ++i) {
      EXPECT_NEAR(wrapped(angle[i] - states[0].angle[i]), 0, 1e-4);
    }
  }
}

TEST(MixerScanSchedule, ManyHeadsAreWalkedWhereTheyFit) {
  MixerShape s{.H = 4, .P = 32, .N = 64, .G = 1, .R = 1, .S = 16};
  const auto walks = [&](MixerSchedule schedule, int64_t sequences) {
    return mixer_scan_walks(s, schedule, sequences, 132, 50'000, 100'000);
  };
  EXPECT_TRUE(walks(MixerSchedule::best, 66));
  EXPECT_FALSE(walks(MixerSchedule::best, 65));
  EXPECT_FALSE(walks(MixerSchedule::chunks, 1000));
  EXPECT_TRUE(walks(MixerSchedule::walk, 1));
  EXPECT_FALSE(walks(MixerSchedule::walk, 0));
  EXPECT_FALSE(mixer_scan_walks(s, MixerSchedule::walk, 1000, 132, 50'000, 49'999));
  s.R = 9;
  EXPECT_FALSE(walks(MixerSchedule::walk, 1000));
  s.R = 1, s.N = 129;
  EXPECT_FALSE(walks(MixerSchedule::walk, 1000));
  s.N = 64, s.P = 33;
  EXPECT_FALSE(walks(MixerSchedule::best, 1000));
  EXPECT_TRUE(walks(MixerSchedule::walk, 1000));
}

TEST(MixerScanSchedule, AWalkHasChunksOfUpTo32Rows) {
  EXPECT_EQ(mixer_scan_walk_chunk(1, 0), 32);
  EXPECT_EQ(mixer_scan_walk_chunk(3, 0), 10);
  EXPECT_EQ(mixer_scan_walk_chunk(8, 100), 4);
  EXPECT_EQ(mixer_scan_walk_chunk(1, 7), 7);
  EXPECT_EQ(mixer_scan_walk_chunk(1000, 0), 1);
}

TEST(MixerScanSchedule, TheBackwardWalksAsManySequencesAsAreKeptWithinBounds) {
  const MixerShape s{.H = 4, .P = 32, .N = 64, .G = 1, .R = 4, .S = 16};
  EXPECT_EQ(mixer_scan_walk_batch(s, 8, 256, 160, false), 256);
  const int64_t some = mixer_scan_walk_batch(s, 8, 4096, 160, false);
  EXPECT_LT(some, 4096);
  const int64_t batches = (4096 + some - 1) / some;
  EXPECT_LT(batches * some - 4096, batches);  // about equal ones
  EXPECT_EQ(mixer_scan_walk_batch(s, 8, 4096, 1 << 30, false), 1);
  EXPECT_EQ(mixer_scan_walk_batch(s, 8, 4096, 160, true), 4096);
  EXPECT_EQ(mixer_scan_walk_batch(s, 8, 4096, 1 << 30, true), 0);
}

TEST(MixerScanSchedule, ManySequencesAreWalked) {
  if (test_device() == Device::cpu) GTEST_SKIP() << "the CPU has one schedule";
  const MixerShape s{.H = 4, .P = 8, .N = 8, .G = 1, .R = 1, .S = 2};
  const int64_t B = 200, T = 40;  // for a GPU of up to 400 multiprocessors
  Random random(16);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {B, T, s.d_proj()});
  const auto scan = [&](MixerSchedule schedule) {
    Tensor y({B, T, s.d_inner()});
    mixer_scan(ctx, {.shape = s,
                     .params = params.views(s),
                     .proj = proj,
                     .y = y,
                     .cu_seqlens = {},
                     .state = {},
                     .schedule = schedule});
    return y;
  };
  const Tensor best = scan(MixerSchedule::best), chunks = scan(MixerSchedule::chunks);
  EXPECT_TRUE(same_bits(best, scan(MixerSchedule::walk)));
  EXPECT_FALSE(same_bits(best, chunks));
  EXPECT_TRUE(near(best, chunks.values(), twice(scan_tolerance(s, T))));
}

TEST(MixerScanSteadyState, ASecondCallAllocatesNothing) {
  const MixerShape s{.H = 4, .P = 32, .N = 32, .G = 1, .R = 1, .S = 8};
  Random random(11);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  const Tensor proj = Tensor::normal(random, {1, 300, s.d_proj()});
  const Tensor y({1, 300, s.d_inner()});
  const MixerScanArgs args{
      .shape = s, .params = params.views(s), .proj = proj, .y = y, .cu_seqlens = {}, .state = {}};
  mixer_scan(ctx, args);
  const int64_t before = ctx.scratch.allocations();
  mixer_scan(ctx, args);
  EXPECT_EQ(ctx.scratch.allocations(), before);
}

}  // namespace
}  // namespace mamba3::testing
