#pragma once

#include <gtest/gtest.h>

#include <span>
#include <string>

#include "core/view.h"

namespace mamba3::testing {

// The one comparator of all tests. `got` is any f32 view; `want` holds the reference in float64,
// row-major.
struct Tolerance {
  // Relative error of a single product or sum in the arithmetic under test, times a safety factor:
  // 1e-6 for f32, 8e-3 for bf16.
  double unit = 1e-6;
  // Terms that a result sums: the per-element bound grows with its square root.
  double terms = 1;
  // An element may differ by unit * sqrt(terms) * (|want| + the tensor's root mean square), and the
  // relative norm of every tile of 64 elements by `tile_norm` units of the same.
};

// Shapes, then positions of NaN and infinity, then the bound of each element, then a norm per tile.
// The failure names the first rule broken, the worst coordinate and the two values there.
::testing::AssertionResult near(const View& got, std::span<const double> want,
                                const Tolerance& tolerance);

// |got - want| / |want| over the whole tensor (infinity if got has a NaN).
double relative_norm(const View& got, std::span<const double> want);

}  // namespace mamba3::testing
