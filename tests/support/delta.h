#pragma once

#include <gtest/gtest.h>

#include <ostream>
#include <span>
#include <string>
#include <vector>

#include "bench/cases.h"
#include "ref/delta.h"
#include "support/compare.h"
#include "support/mixer.h"  // rounded()
#include "support/tensor.h"

namespace mamba3::bench {

// How GoogleTest names a case.
inline void PrintTo(const DeltaCase& row, std::ostream* out) {
  *out << row.name;
}

}  // namespace mamba3::bench

namespace mamba3::testing {

using bench::DeltaCase;

// The shapes that every delta test runs.
inline std::vector<DeltaCase> delta_cases() {
  const DeltaCase base{.shape = {.H = 2, .K = 32, .V = 32}, .B = 2, .T = 75};
  std::vector<DeltaCase> cases = bench::delta_cases(base);
  const auto add = [&](const std::string& name, auto change) {
    DeltaCase row = base;
    row.name = name;
    change(row);
    cases.push_back(row);
  };
  // Around the chunks of the implementations.
  add("T16", [](DeltaCase& c) { c.T = 16; });
  add("T33", [](DeltaCase& c) { c.T = 33; });
  add("V_above_K", [](DeltaCase& c) { c.shape.K = 24, c.shape.V = 70; });
  add("K1", [](DeltaCase& c) { c.shape.K = 1, c.shape.V = 6; });
  add("K64_V64", [](DeltaCase& c) { c.shape.K = c.shape.V = 64; });
  add("K64_V32", [](DeltaCase& c) { c.shape.K = 64, c.shape.V = 32; });
  // Wider than the shared memory of a GPU.
  add("K160_V240_T20", [](DeltaCase& c) { c.shape.K = 160, c.shape.V = 240, c.T = 20; });
  return cases;
}

struct DeltaParamTensors {
  Tensor A_log, dt_bias, norm;

  DeltaParamTensors(Random& random, const DeltaShape& s)
      : A_log(Tensor::normal(random, {s.H}, 1)),
        dt_bias(Tensor::normal(random, {s.H}, 1)),
        norm(Tensor::normal(random, {s.V}, 1)) {}
  explicit DeltaParamTensors(const DeltaShape& s)  // zeros, for gradients
      : A_log(Tensor::zeros({s.H})), dt_bias(Tensor::zeros({s.H})), norm(Tensor::zeros({s.V})) {}

  DeltaParams views() const { return {.A_log = A_log, .dt_bias = dt_bias, .norm = norm}; }
  ref::DeltaParams<double> reference() const {
    return {A_log.values(), dt_bias.values(), norm.values()};
  }
};

// A pool of states; row i of the pool serves sequence i in reverse order, so that rows matter.
struct DeltaStateTensors {
  Tensor delta, rows;

  DeltaStateTensors(Random& random, const DeltaShape& s, int64_t sequences)
      : delta(Tensor::normal(random, {sequences, s.H, s.V, s.K})), rows({sequences}, DType::i32) {
    for (int64_t i = 0; i < sequences; ++i) rows.set(i, static_cast<double>(sequences - 1 - i));
  }

  DeltaState views() const { return {.delta = delta, .rows = rows}; }
  View row(int64_t sequence) const {
    return delta.view().select(0, static_cast<int64_t>(rows.at(sequence)));
  }
};

// What the reference makes of proj (B, T, d_proj) and the states (H, V, K) of its sequences, which
// it updates.
inline std::vector<double> reference_scan(const DeltaShape& s, const DeltaParamTensors& params,
                                          const Tensor& proj,
                                          std::vector<std::vector<double>>& states) {
  const int64_t B = proj.host().dim(0), T = proj.host().dim(1);
  const auto reference = params.reference();
  const auto inputs = proj.values();
  std::vector<double> y(static_cast<size_t>(B * T * s.d_inner()));
  for (int64_t b = 0; b < B; ++b) {
    ref::delta_scan(s, reference, inputs.data() + b * T * s.d_proj(), T,
                    states[static_cast<size_t>(b)], y.data() + b * T * s.d_inner());
  }
  return y;
}

inline std::vector<std::vector<double>> reference_states(const DeltaStateTensors& state,
                                                         int64_t B) {
  std::vector<std::vector<double>> states;
  for (int64_t b = 0; b < B; ++b) states.push_back(values_of(state.row(b)));
  return states;
}

// An output sums over the K channels of the state and the keys before it; the norm divides by what
// is left of the terms.
inline Tolerance delta_tolerance(const DeltaShape& s, int64_t T) {
  return {.unit = 4e-6, .terms = static_cast<double>(s.K + T)};
}

inline void expect_state(const DeltaStateTensors& got, int64_t sequence,
                         std::span<const double> want, const Tolerance& bound) {
  // Head by head, whose decays differ.
  const View state = got.row(sequence);
  const size_t head = want.size() / static_cast<size_t>(state.dim(0));
  for (int64_t h = 0; h < state.dim(0); ++h) {
    const auto of_head = want.subspan(static_cast<size_t>(h) * head, head);
    EXPECT_TRUE(near(state.select(0, h), of_head, bound)) << "head " << h;
  }
}

}  // namespace mamba3::testing
