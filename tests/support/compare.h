#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <span>

#include "core/view.h"

namespace mamba3::testing {

// The one comparator of all tests. `got` is any view of a floating dtype, strided or not; `want`
// holds the reference in float64, row-major. With rms the root mean square of want, an element may
// differ by
//   bound = unit * sqrt(terms) * (|want| + rms),
// and so that a whole tile cannot hide just inside the bounds, the norm of the difference over each
// tile of kCompareTile elements may reach tile_norm times the norm of the bounds there.
struct Tolerance {
  // Relative error of a single product or sum in the arithmetic under test, times a safety factor.
  double unit = 1e-6;
  // Terms that a result sums: the bound grows with its square root, as rounding errors do.
  double terms = 1;
  double tile_norm = 0.5;
};

inline constexpr int64_t kCompareTile = 64;

// The unit for results that are rounded to `dtype`: 1e-6 for f32, 8e-3 for bf16, 1e-3 for f16.
double unit_of(DType dtype);
// For a sum of so many terms that is taken in f32 and then rounded to `dtype`.
Tolerance rounded_to(DType dtype, double terms = 1);

// Shapes, then positions of NaN and infinity, then the bound of each element, then a norm per tile.
// The failure names the first rule broken, the worst coordinate and the two values there.
::testing::AssertionResult near(const View& got, std::initializer_list<int64_t> dims,
                                std::span<const double> want, const Tolerance& tolerance);
// The same, where want has the shape of got and only its size can be wrong.
::testing::AssertionResult near(const View& got, std::span<const double> want,
                                const Tolerance& tolerance);

// Two views of one dtype and shape hold the same bits: for invariants that must hold exactly. NaN
// equals NaN of the same bits, and 0 differs from -0.
::testing::AssertionResult same_bits(const View& got, const View& want);

// |got - want| / |want| over the whole tensor (infinity if either has a NaN or an infinity, or the
// sizes differ).
double relative_norm(const View& got, std::span<const double> want);

}  // namespace mamba3::testing
