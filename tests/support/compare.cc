#include "support/compare.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "support/device.h"
#include "support/tensor.h"

namespace mamba3::testing {

namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

// (i, j, k) of the element at a row-major position.
std::string coordinate(const View& view, int64_t position) {
  std::vector<int64_t> index(static_cast<size_t>(view.rank));
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    index[static_cast<size_t>(axis)] = position % view.dim(axis);
    position /= view.dim(axis);
  }
  return fmt::format("({})", fmt::join(index, ", "));
}

bool same_kind(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return true;
}

AssertionResult same_non_finite(const View& view, std::span<const double> got,
                                std::span<const double> want) {
  int64_t first = -1, count = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (same_kind(got[i], want[i])) continue;
    if (count++ == 0) first = static_cast<int64_t>(i);
  }
  if (count == 0) return AssertionSuccess();
  const auto i = static_cast<size_t>(first);
  return AssertionFailure() << fmt::format(
             "NaN or infinity differs at {} of {} elements, first at {}: got {}, want {}", count,
             want.size(), coordinate(view, first), got[i], want[i]);
}

double rms_of_finite(std::span<const double> values) {
  double sum = 0, count = 0;
  for (const double value : values) {
    if (!std::isfinite(value)) continue;
    sum += value * value;
    ++count;
  }
  return count > 0 ? std::sqrt(sum / count) : 0;
}

// Differences and their bounds; 0 and 0 where both values are the same NaN or infinity.
struct Differences {
  std::vector<double> error, bound;

  Differences(std::span<const double> got, std::span<const double> want, const Tolerance& t) {
    const double rms = rms_of_finite(want), unit = t.unit * std::sqrt(t.terms);
    for (size_t i = 0; i < want.size(); ++i) {
      const bool finite = std::isfinite(want[i]);
      error.push_back(finite ? std::abs(got[i] - want[i]) : 0);
      bound.push_back(finite ? unit * (std::abs(want[i]) + rms) : 0);
    }
  }
  // How far an error is above its bound; both may be 0.
  double excess(size_t i) const {
    if (error[i] == 0) return 0;
    return bound[i] > 0 ? error[i] / bound[i] : std::numeric_limits<double>::infinity();
  }
};

size_t worst_between(const Differences& d, size_t begin, size_t end) {
  size_t worst = begin;
  for (size_t i = begin; i < end; ++i) {
    if (d.excess(i) > d.excess(worst)) worst = i;
  }
  return worst;
}

std::string describe(const View& view, std::span<const double> got, std::span<const double> want,
                     const Differences& d, size_t i) {
  return fmt::format("at {}: got {:.9g}, want {:.9g}, difference {:.3g}, bound {:.3g}",
                     coordinate(view, static_cast<int64_t>(i)), got[i], want[i], d.error[i],
                     d.bound[i]);
}

AssertionResult elements_in_bounds(const View& view, std::span<const double> got,
                                   std::span<const double> want, const Differences& d) {
  int64_t count = 0;
  for (size_t i = 0; i < want.size(); ++i) count += d.excess(i) > 1;
  if (count == 0) return AssertionSuccess();
  return AssertionFailure() << fmt::format("{} of {} elements out of bounds, the worst ", count,
                                           want.size())
                            << describe(view, got, want, d, worst_between(d, 0, want.size()));
}

double norm(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

AssertionResult tiles_in_bounds(const View& view, std::span<const double> got,
                                std::span<const double> want, const Differences& d,
                                double tile_norm) {
  for (size_t begin = 0; begin < want.size(); begin += kCompareTile) {
    const size_t n = std::min(want.size() - begin, static_cast<size_t>(kCompareTile));
    const double error = norm(std::span(d.error).subspan(begin, n));
    // A single element may always use its own bound up.
    const double share = std::max(tile_norm, 1 / std::sqrt(static_cast<double>(n)));
    const double bound = share * norm(std::span(d.bound).subspan(begin, n));
    if (error <= bound) continue;
    return AssertionFailure() << fmt::format(
                                     "norm of the difference over the tile of {} from {} is "
                                     "{:.3g}, bound {:.3g}, the worst ",
                                     n, coordinate(view, static_cast<int64_t>(begin)), error, bound)
                              << describe(view, got, want, d, worst_between(d, begin, begin + n));
  }
  return AssertionSuccess();
}

}  // namespace

double unit_of(DType dtype) {
  return dtype == DType::bf16 ? 8e-3 : dtype == DType::f16 ? 1e-3 : 1e-6;
}

Tolerance rounded_to(DType dtype, double terms) {
  return {.unit = unit_of(dtype), .terms = dtype == DType::f32 ? terms : 1};
}

AssertionResult near(const View& got, std::initializer_list<int64_t> dims,
                     std::span<const double> want, const Tolerance& tolerance) {
  if (!std::equal(got.dims.begin(), got.dims.begin() + got.rank, dims.begin(), dims.end())) {
    return AssertionFailure() << fmt::format("shape: got {}, want ({})", got.shape(),
                                             fmt::join(dims, ", "));
  }
  return near(got, want, tolerance);
}

AssertionResult near(const View& got, std::span<const double> want, const Tolerance& tolerance) {
  if (got.empty()) return AssertionFailure() << "got an empty view";
  if (got.size() != static_cast<int64_t>(want.size())) {
    return AssertionFailure() << fmt::format("size: got {} with {} elements, want {} elements",
                                             got.shape(), got.size(), want.size());
  }
  const std::vector<double> values = values_of(got);
  if (auto result = same_non_finite(got, values, want); !result) return result;
  const Differences differences(values, want, tolerance);
  if (auto result = elements_in_bounds(got, values, want, differences); !result) return result;
  return tiles_in_bounds(got, values, want, differences, tolerance.tile_norm);
}

AssertionResult same_bits(const View& any_got, const View& any_want) {
  const HostCopy got_copy = host_copy(any_got), want_copy = host_copy(any_want);
  const View &got = got_copy.view, &want = want_copy.view;
  if (got.dtype != want.dtype || got.shape() != want.shape()) {
    return AssertionFailure() << fmt::format("got {} {}, want {} {}", name_of(got.dtype),
                                             got.shape(), name_of(want.dtype), want.shape());
  }
  int64_t first = -1, count = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const auto bytes = static_cast<size_t>(size_of(got.dtype));
    if (std::memcmp(element_of(got, i), element_of(want, i), bytes) == 0) continue;
    if (count++ == 0) first = i;
  }
  if (count == 0) return AssertionSuccess();
  return AssertionFailure() << fmt::format(
             "{} of {} elements differ in bits, first at {}: got {:.9g}, want {:.9g}", count,
             got.size(), coordinate(got, first), value_of(got, first), value_of(want, first));
}

double relative_norm(const View& got, std::span<const double> want) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<double> values = values_of(got);
  if (values.size() != want.size()) return kInfinity;
  double difference = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (values[i] - want[i]) * (values[i] - want[i]);
  }
  if (difference == 0) return 0;
  const double ratio = std::sqrt(difference) / norm(want);
  return std::isfinite(ratio) ? ratio : kInfinity;
}

}  // namespace mamba3::testing
