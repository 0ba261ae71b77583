#include "ops/mixer_scan.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/mixer.h"

namespace mamba3::testing {
namespace {

// Everything that a scan reads, or the gradients of it. all() puts it in one vector, so that one
// complex step serves for every input: proj, the ten parameters, then the four state tensors of
// each sequence, if the scan has states.
struct ScanTensors {
  MixerParamTensors params;
  Tensor proj;
  MixerStateTensors state;
  bool has_states;

  static ScanTensors random(Random& random, const MixerCase& row, DType dtype, bool has_states) {
    const MixerShape& s = row.shape;
    return {MixerParamTensors(random, s),
            Tensor::normal(random, {row.B, row.T, s.d_proj()}, 1, dtype),
            MixerStateTensors(random, s, row.B, 0.5), has_states};
  }
  MixerState states() const { return has_states ? state.views() : MixerState{}; }

  std::vector<double> all() const {
    std::vector<double> values = proj.values();
    const auto append = [&](const std::vector<double>& more) {
      values.insert(values.end(), more.begin(), more.end());
    };
    for (const Tensor* tensor : {&params.dt_bias, &params.A_log, &params.B_bias, &params.C_bias,
                                 &params.B_norm, &params.C_norm, &params.D, &params.mimo_x,
                                 &params.mimo_z, &params.mimo_o, &params.norm}) {
      append(tensor->values());
    }
    for (int64_t b = 0; has_states && b < proj.view().dim(0); ++b) {
      const auto row = state.reference<double>(b);
      append(row.angle), append(row.ssm), append(row.k_prev), append(row.v_prev);
    }
    return values;
  }
};

// y and the final states, dotted with fixed weights, as a function of ScanTensors::all().
struct Loss {
  const MixerCase& row;
  std::vector<double> d_y;                       // (B, T, H P)
  std::vector<ref::MixerState<double>> d_state;  // of each sequence; none: begin from zero

  template <typename T>
  T operator()(const std::vector<T>& values) const {
    const MixerShape& s = row.shape;
    const T* at = values.data();
    const auto take = [&](int64_t n) {
      at += n;
      return std::vector<T>(at - n, at);
    };
    const int64_t RN = s.R * s.N, RP = s.R * s.P, size = row.T * s.d_inner();
    const auto proj = take(row.B * row.T * s.d_proj());
    ref::MixerParams<T> params;
    params.dt_bias = take(s.H), params.A_log = take(s.H);
    params.B_bias = take(s.H * RN), params.C_bias = take(s.H * RN);
    params.B_norm = take(s.N), params.C_norm = take(s.N), params.D = take(s.H);
    params.mimo_x = take(s.H * RP), params.mimo_z = take(s.H * RP), params.mimo_o = take(s.H * RP);
    params.norm = take(s.H * s.P);
    T loss(0);
    for (int64_t b = 0; b < row.B; ++b) {
      auto state = ref::MixerState<T>::zero(s);
      if (!d_state.empty()) {
        state.angle = take(s.H * s.S), state.ssm = take(s.H * s.P * s.N);
        state.k_prev = take(s.H * RN), state.v_prev = take(s.H * s.P);
      }
      std::vector<T> y(static_cast<size_t>(size));
      ref::mixer_scan(s, params, proj.data() + b * row.T * s.d_proj(), row.T, state, y.data());
      loss +=
          dot(std::span(d_y).subspan(static_cast<size_t>(b * size), static_cast<size_t>(size)), y);
      if (d_state.empty()) continue;
      const auto& weight = d_state[static_cast<size_t>(b)];
      loss += dot<T>(weight.angle, state.angle) + dot<T>(weight.ssm, state.ssm) +
              dot<T>(weight.k_prev, state.k_prev) + dot<T>(weight.v_prev, state.v_prev);
    }
    return loss;
  }
};

// A walk has no states.
struct Problem {
  MixerCase row;
  MixerSchedule schedule;
  Random random;
  ScanTensors inputs;
  Tensor d_y;

  Problem(const ScheduledCase& scheduled, uint64_t seed, DType dtype = DType::f32)
      : row(scheduled.row),
        schedule(scheduled.schedule),
        random(seed),
        inputs(ScanTensors::random(random, row, dtype, schedule != MixerSchedule::walk)),
        d_y(Tensor::normal(random, {row.B, row.T, row.shape.d_inner()}, 1, dtype)) {}

  // Zeros where the op accumulates; the gradient of the final states where it reads one.
  ScanTensors gradients() const {
    const MixerShape& s = row.shape;
    Random weights(99);
    return {MixerParamTensors(s), Tensor({row.B, row.T, s.d_proj()}, d_y.host().dtype),
            MixerStateTensors(weights, s, row.B, 1), inputs.has_states};
  }
  Loss loss() const {
    Loss loss{row, d_y.values(), {}};
    const auto d = gradients();
    for (int64_t b = 0; inputs.has_states && b < row.B; ++b) {
      loss.d_state.push_back(d.state.reference<double>(b));
    }
    return loss;
  }
  void backward(Context& ctx, const ScanTensors& d, int64_t chunk) const {
    const MixerShape& s = row.shape;
    mixer_scan_backward(ctx, {.shape = s,
                              .params = inputs.params.views(s),
                              .proj = inputs.proj,
                              .cu_seqlens = {},
                              .initial = inputs.states(),
                              .d_y = d_y,
                              .d_proj = d.proj,
                              .d_params = d.params.views(s),
                              .d_state = d.states(),
                              .chunk = chunk,
                              .schedule = schedule});
  }
};

class MixerScanBackward : public ::testing::TestWithParam<ScheduledCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, MixerScanBackward,
                         ::testing::ValuesIn(scheduled_backward_cases(MixerSchedule::best)),
                         [](const auto& row) { return row.param.row.name; });
INSTANTIATE_TEST_SUITE_P(Walk, MixerScanBackward,
                         ::testing::ValuesIn(scheduled_backward_cases(MixerSchedule::walk)),
                         [](const auto& row) { return row.param.row.name; });

// Every element of every gradient, at a size where that is quick.
TEST_P(MixerScanBackward, EqualsTheComplexStepEverywhere) {
  ScheduledCase small = GetParam();
  MixerCase& row = small.row;
  row.shape.H = std::min<int64_t>(row.shape.H, 2);
  row.shape.P = std::min<int64_t>(row.shape.P, 3);
  row.shape.S = row.shape.S * 8 / row.shape.N;
  row.shape.N = 8;
  row.T = std::min<int64_t>(row.T, 7);
  for (const DType dtype : test_dtypes()) {
    const Problem problem(small, 20, dtype);
    Context ctx = make_context(2);
    const auto d = problem.gradients();
    problem.backward(ctx, d, 3);
    const auto want = complex_step(problem.loss(), problem.inputs.all());
    const auto got = d.all();
    const Tolerance bound{.unit = 3e-6, .terms = 64, .tile_norm = 0.5};
    // d_proj, which comes first, is rounded to dtype; the rest is f32.
    const size_t proj = d.proj.values().size();
    const auto expect_near = [&](size_t from, size_t to, const Tolerance& tolerance) {
      const auto part = std::span(got).subspan(from, to - from);
      const Tensor tensor = Tensor::of({static_cast<int64_t>(part.size())}, part);
      EXPECT_TRUE(near(tensor, std::span(want).subspan(from, to - from), tolerance));
    };
    if (dtype == DType::f32) {
      expect_near(0, got.size(), bound);
    } else {
      expect_near(0, proj, {.unit = unit_of(dtype) + bound.unit * std::sqrt(bound.terms)});
      expect_near(proj, got.size(), bound);
    }
  }
}

// Directional derivatives at the real sizes: a wrong part anywhere shows in a random direction.
TEST_P(MixerScanBackward, EqualsTheComplexStepInRandomDirections) {
  for (const DType dtype : test_dtypes()) {
    const Problem problem(GetParam(), 21, dtype);
    Context ctx = make_context(2);
    const auto d = problem.gradients();
    problem.backward(ctx, d, 0);
    const auto point = problem.inputs.all(), gradient = d.all();
    const auto loss = problem.loss();
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
      const double want = std::imag(loss(stepped)) / ref::kComplexStep;
      const double unit = dtype == DType::f32 ? 1e-5 : unit_of(dtype);
      EXPECT_NEAR(got, want, unit * std::sqrt(norm));
    }
  }
}

TEST_P(MixerScanBackward, GivesTheSameBitsOnAnyNumberOfThreads) {
  const Problem problem(GetParam(), 23);
  Context one = make_context(1), three = make_context(3);
  const auto a = problem.gradients(), b = problem.gradients();
  problem.backward(one, a, 0);
  problem.backward(three, b, 0);
  EXPECT_EQ(a.all(), b.all());
}

// Longer than a segment of chunks, where states are kept at two levels.
TEST(MixerScanBackwardSegments, LongSequencesEqualThoseInLargerChunks) {
  MixerCase row = mixer_cases().front();
  row.T = 150;
  const Problem problem({row}, 24);
  Context ctx = make_context(2);
  const auto small = problem.gradients(), large = problem.gradients();
  problem.backward(ctx, small, 2);  // 75 chunks, 3 segments
  problem.backward(ctx, large, 150);
  const auto got = small.all();
  const Tensor got_tensor = Tensor::of({static_cast<int64_t>(got.size())}, got);
  EXPECT_TRUE(near(got_tensor, large.all(), {.unit = 6e-6, .terms = 200}));
}

// On the GPU more chunks than it takes at a time; sequences begin and end inside of segments.
TEST(MixerScanBackwardSegments, SequencesLongerThanASegmentEqualThoseInLargerChunks) {
  MixerCase row{.shape = {.H = 16, .P = 64, .N = 128, .G = 2, .R = 1, .S = 32}, .B = 2, .T = 300};
  EXPECT_LT(2 * mixer_scan_segment(row.shape, 1, true), row.B * row.T);
  const Problem problem({row}, 26);
  Context ctx = make_context(2);
  const auto small = problem.gradients(), large = problem.gradients();
  problem.backward(ctx, small, 1);
  problem.backward(ctx, large, 64);
  const auto got = small.all();
  const Tensor got_tensor = Tensor::of({static_cast<int64_t>(got.size())}, got);
  // The gradient of an angle sums over the heads and all later tokens.
  const auto terms = static_cast<double>(row.shape.H * row.T);
  EXPECT_TRUE(near(got_tensor, large.all(), {.unit = 6e-6, .terms = terms}));
}

// A bf16 state is for the forward.
TEST(MixerScanBackwardChecks, TheGradientOfTheStateIsF32) {
  if (test_device() == Device::cpu) GTEST_SKIP() << "on the CPU every state is f32";
  const Problem problem({mixer_cases().front()}, 27);
  const MixerShape& s = problem.row.shape;
  Context ctx = make_context(2);
  const auto d = problem.gradients();
  Random random(28);
  const MixerStateTensors d_state(random, s, problem.row.B, 1, DType::bf16);
  const MixerScanBackwardArgs args{.shape = s,
                                   .params = problem.inputs.params.views(s),
                                   .proj = problem.inputs.proj,
                                   .cu_seqlens = {},
                                   .initial = {},
                                   .d_y = problem.d_y,
                                   .d_proj = d.proj,
                                   .d_params = d.params.views(s),
                                   .d_state = d_state.views()};
  EXPECT_EQ(input_error_of([&] { mixer_scan_backward(ctx, args); }),
            "[mixer_scan_backward] d_state.ssm must be f32");
}

// Packed sequences and batches of more than a wave, without states.
TEST(MixerScanBackwardPacked, EqualsTheSequencesApart) {
  const MixerCase base = mixer_cases().front();
  const MixerShape& s = base.shape;
  Random random(25);
  Context ctx = make_context(2);
  const MixerParamTensors params(random, s);
  std::vector<int32_t> cuts = {0};
  for (int i = 0; i < 40; ++i)
    cuts.push_back(cuts.back() + static_cast<int32_t>(random.integer(0, 5)));
  const int64_t T = cuts.back();
  Tensor cu({static_cast<int64_t>(cuts.size())}, DType::i32);
  for (size_t i = 0; i < cuts.size(); ++i) cu.set(static_cast<int64_t>(i), cuts[i]);
  const Tensor proj = Tensor::normal(random, {1, T, s.d_proj()});
  const Tensor d_y = Tensor::normal(random, {1, T, s.d_inner()});
  for (const MixerSchedule schedule : mixer_schedules()) {
    const Tensor packed({1, T, s.d_proj()}), apart({1, T, s.d_proj()});
    const MixerParamTensors d_packed(s), d_apart(s);
    mixer_scan_backward(ctx, {.shape = s,
                              .params = params.views(s),
                              .proj = proj,
                              .cu_seqlens = cu,
                              .initial = {},
                              .d_y = d_y,
                              .d_proj = packed,
                              .d_params = d_packed.views(s),
                              .d_state = {},
                              .schedule = schedule});
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      if (cuts[i] == cuts[i + 1]) continue;
      const auto part = [&](const Tensor& tensor) {
        return tensor.view().slice(1, cuts[i], cuts[i + 1]);
      };
      mixer_scan_backward(ctx, {.shape = s,
                                .params = params.views(s),
                                .proj = part(proj),
                                .cu_seqlens = {},
                                .initial = {},
                                .d_y = part(d_y),
                                .d_proj = part(apart),
                                .d_params = d_apart.views(s),
                                .d_state = {},
                                .schedule = schedule});
    }
    EXPECT_TRUE(near(packed, apart.values(), {.unit = 1e-6}));
    EXPECT_TRUE(near(d_packed.B_bias, d_apart.B_bias.values(), {.unit = 1e-6, .terms = 100}));
    EXPECT_TRUE(near(d_packed.C_norm, d_apart.C_norm.values(), {.unit = 1e-6, .terms = 100}));
    EXPECT_TRUE(near(d_packed.dt_bias, d_apart.dt_bias.values(), {.unit = 1e-6, .terms = 100}));
  }
}

}  // namespace
}  // namespace mamba3::testing
