#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "bench/cases.h"
#include "ops/mixer_scan.h"
#include "ref/mixer.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/tensor.h"

namespace mamba3::bench {

// How GoogleTest names a case.
inline void PrintTo(const MixerCase& row, std::ostream* out) {
  *out << row.name;
}

}  // namespace mamba3::bench

namespace mamba3::testing {

using bench::MixerCase;

// The shapes that every mixer test runs.
inline std::vector<MixerCase> mixer_cases() {
  return bench::mixer_cases(
      {.shape = {.H = 4, .P = 32, .N = 32, .G = 1, .R = 1, .S = 8}, .B = 2, .T = 100});
}

// The schedules that a test forces on the device: the CPU has but one.
inline std::vector<MixerSchedule> mixer_schedules() {
  if (test_device() == Device::cpu) return {MixerSchedule::best};
  return {MixerSchedule::best, MixerSchedule::walk};
}

// A case by the schedule of the GPU's choice, or by one of others.
struct ScheduledCase {
  MixerCase row;
  MixerSchedule schedule = MixerSchedule::best;
};
inline void PrintTo(const ScheduledCase& scheduled, std::ostream* out) {
  *out << scheduled.row.name;
}
inline std::vector<ScheduledCase> scheduled_cases(MixerSchedule schedule) {
  std::vector<ScheduledCase> cases;
  if (std::ranges::count(mixer_schedules(), schedule) == 0) return cases;
  for (const MixerCase& row : mixer_cases()) cases.push_back({row, schedule});
  return cases;
}
// The same of the backward, which walks without an output norm only.
inline std::vector<ScheduledCase> scheduled_backward_cases(MixerSchedule schedule) {
  auto cases = scheduled_cases(schedule);
  if (schedule == MixerSchedule::walk) {
    std::erase_if(cases, [](const ScheduledCase& c) { return c.row.shape.out_norm; });
  }
  return cases;
}

// Random parameters in the ranges of trained models.
struct MixerParamTensors {
  Tensor dt_bias, B_bias, C_bias, B_norm, C_norm, D, mimo_x, mimo_z, mimo_o, norm, A_log;

  MixerParamTensors(Random& random, const MixerShape& s)
      : dt_bias(Tensor::normal(random, {s.H}, 1)),
        B_bias(Tensor::normal(random, {s.H, s.R, s.N}, 1)),
        C_bias(Tensor::normal(random, {s.H, s.R, s.N}, 1)),
        B_norm(Tensor::normal(random, {s.N}, 1)),
        C_norm(Tensor::normal(random, {s.N}, 1)),
        D(Tensor::normal(random, {s.H}, 1)),
        mimo_x(Tensor::normal(random, {s.H, s.R, s.P}, 0.5)),
        mimo_z(Tensor::normal(random, {s.H, s.R, s.P}, 1)),
        mimo_o(Tensor::normal(random, {s.H, s.R, s.P}, 0.5)),
        norm(Tensor::normal(random, {s.H, s.P}, 1)),
        A_log(spread(s.H)) {}
  explicit MixerParamTensors(const MixerShape& s)  // zeros, for gradients
      : dt_bias(Tensor::zeros({s.H})),
        B_bias(Tensor::zeros({s.H, s.R, s.N})),
        C_bias(Tensor::zeros({s.H, s.R, s.N})),
        B_norm(Tensor::zeros({s.N})),
        C_norm(Tensor::zeros({s.N})),
        D(Tensor::zeros({s.H})),
        mimo_x(Tensor::zeros({s.H, s.R, s.P})),
        mimo_z(Tensor::zeros({s.H, s.R, s.P})),
        mimo_o(Tensor::zeros({s.H, s.R, s.P})),
        norm(Tensor::zeros({s.H, s.P})),
        A_log(Tensor::zeros({s.H})) {}

  // From -1 to 1, without a draw: what is drawn next is the same as for a shape without A_log.
  static Tensor spread(int64_t n) {
    std::vector<double> values;
    for (int64_t i = 0; i < n; ++i)
      values.push_back(2 * static_cast<double>(i) / static_cast<double>(n) - 1);
    return Tensor::of({n}, values);
  }

  // Those that the shape has.
  MixerParams views(const MixerShape& s) const {
    MixerParams p{.dt_bias = dt_bias,
                  .A_log = {},
                  .B_bias = {},
                  .C_bias = {},
                  .B_norm = {},
                  .C_norm = {},
                  .D = D,
                  .mimo_x = {},
                  .mimo_z = {},
                  .mimo_o = {},
                  .norm = {}};
    if (!s.has_dd_A()) p.A_log = A_log;
    if (s.bc_bias) p.B_bias = B_bias, p.C_bias = C_bias;
    if (s.bc_norm) p.B_norm = B_norm, p.C_norm = C_norm;
    if (s.mimo) p.mimo_x = mimo_x, p.mimo_z = mimo_z, p.mimo_o = mimo_o;
    if (s.out_norm) p.norm = norm;
    return p;
  }

  template <typename T>
  ref::MixerParams<T> reference() const {
    const auto vector = [](const Tensor& tensor) {
      const auto values = tensor.values();
      return std::vector<T>(values.begin(), values.end());
    };
    return {vector(dt_bias), vector(A_log),  vector(B_bias), vector(C_bias),
            vector(B_norm),  vector(C_norm), vector(D),      vector(mimo_x),
            vector(mimo_z),  vector(mimo_o), vector(norm)};
  }
};

// A pool of states; row i of the pool serves sequence i in reverse order, so that rows matter.
struct MixerStateTensors {
  Tensor angle, ssm, k_prev, v_prev, rows;

  MixerStateTensors(Random& random, const MixerShape& s, int64_t sequences, double size = 1,
                    DType ssm_dtype = DType::f32)
      : angle(Tensor::normal(random, {sequences, s.H, s.S}, size)),
        ssm(Tensor::normal(random, {sequences, s.H, s.P, s.N}, size, ssm_dtype)),
        k_prev(Tensor::normal(random, {sequences, s.R, s.H, s.N}, size)),
        v_prev(Tensor::normal(random, {sequences, s.H, s.P}, size)),
        rows({sequences}, DType::i32) {
    for (int64_t i = 0; i < sequences; ++i) rows.set(i, static_cast<double>(sequences - 1 - i));
  }

  MixerState views() const {
    return {.angle = angle, .ssm = ssm, .k_prev = k_prev, .v_prev = v_prev, .rows = rows};
  }

  template <typename T>
  ref::MixerState<T> reference(int64_t sequence) const {
    const int64_t row = static_cast<int64_t>(rows.at(sequence));
    const auto vector = [&](const Tensor& tensor) {
      const auto values = values_of(tensor.view().select(0, row));
      return std::vector<T>(values.begin(), values.end());
    };
    return {vector(angle), vector(ssm), vector(k_prev), vector(v_prev)};
  }
};

// What the reference makes of proj (B, T, d_proj) and states, which it updates.
inline std::vector<double> reference_scan(const MixerShape& s, const MixerParamTensors& params,
                                          const Tensor& proj,
                                          std::vector<ref::MixerState<double>>& states) {
  const int64_t B = proj.host().dim(0), T = proj.host().dim(1);
  const auto reference = params.reference<double>();
  const auto inputs = proj.values();
  std::vector<double> y(static_cast<size_t>(B * T * s.d_inner()));
  for (int64_t b = 0; b < B; ++b) {
    ref::mixer_scan(s, reference, inputs.data() + b * T * s.d_proj(), T,
                    states[static_cast<size_t>(b)], y.data() + b * T * s.d_inner());
  }
  return y;
}

inline std::vector<ref::MixerState<double>> reference_states(const MixerStateTensors& state,
                                                             int64_t B) {
  std::vector<ref::MixerState<double>> states;
  for (int64_t b = 0; b < B; ++b) states.push_back(state.reference<double>(b));
  return states;
}

inline double wrapped(double angle) {  // to (-pi, pi], to compare angles modulo 2 pi
  return std::remainder(angle, 2 * std::numbers::pi);
}

// An output sums over the N channels of the state and the R T keys before it, whose angles are sums
// of T steps: each rounds at up to 2 pi, where floats are 5e-7 apart, and turns a key by that much.
inline Tolerance scan_tolerance(const MixerShape& s, int64_t T) {
  return {.unit = 5e-6, .terms = static_cast<double>(s.N + s.R * T)};
}

// A result of `bound` that was then rounded to dtype.
inline Tolerance rounded(Tolerance bound, DType dtype) {
  if (dtype != DType::f32) bound = {.unit = unit_of(dtype) + bound.unit * std::sqrt(bound.terms)};
  return bound;
}

inline void expect_state(const MixerStateTensors& got, int64_t sequence,
                         const ref::MixerState<double>& want, const Tolerance& bound) {
  const int64_t row = static_cast<int64_t>(got.rows.at(sequence));
  // Head by head: their step sizes, and so the sizes of their states, differ by orders of
  // magnitude.
  const View ssm = got.ssm.view().select(0, row);
  const size_t head = want.ssm.size() / static_cast<size_t>(ssm.dim(0));
  for (int64_t h = 0; h < ssm.dim(0); ++h) {
    const auto of_head = std::span(want.ssm).subspan(static_cast<size_t>(h) * head, head);
    EXPECT_TRUE(near(ssm.select(0, h), of_head, rounded(bound, ssm.dtype))) << "head " << h;
  }
  EXPECT_TRUE(near(got.k_prev.view().select(0, row), want.k_prev, bound));
  EXPECT_TRUE(near(got.v_prev.view().select(0, row), want.v_prev, bound));
  const auto angle = values_of(got.angle.view().select(0, row));
  for (size_t i = 0; i < angle.size(); ++i) {
    EXPECT_NEAR(wrapped(angle[i] - want.angle[i]), 0, 6 * bound.unit) << "angle " << i;
  }
}

}  // namespace mamba3::testing
