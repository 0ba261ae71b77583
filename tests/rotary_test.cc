#include "ops/rotary.h"

#include <cmath>

#include "bench/cases.h"
#include "ref/rotary.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

using bench::RotaryCase;

class Rotary : public ::testing::TestWithParam<RotaryCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, Rotary,
                         ::testing::ValuesIn(bench::rotary_cases({.B = 2, .T = 19, .heads = 3})),
                         [](const auto& row) { return row.param.name; });

// Two products and a sum, each rounded, of numbers that were rounded.
Tolerance tolerance_of(DType dtype) {
  return dtype == DType::f32 ? Tolerance{.unit = 3e-7} : rounded_to(dtype);
}

// Row by row of the batch, from these positions on.
template <typename T>
std::vector<T> reference(const RotaryCase& c, const std::vector<T>& x,
                         const std::vector<double>& start, double base = 10000,
                         bool inverse = false) {
  const size_t length = x.size() / static_cast<size_t>(c.B);
  std::vector<T> out;
  for (size_t b = 0; b < static_cast<size_t>(c.B); ++b) {
    const std::vector<T> row(x.begin() + static_cast<ptrdiff_t>(b * length),
                             x.begin() + static_cast<ptrdiff_t>((b + 1) * length));
    const auto part =
        ref::rotary(row, static_cast<size_t>(c.heads * c.d), static_cast<size_t>(c.d),
                    static_cast<size_t>(c.dims), base, static_cast<int64_t>(start[b]), inverse);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

// Far apart, so that the sequence matters; the last far out, where an angle formed in f32 would be
// off by hundredths.
Tensor starts(int64_t B) {
  std::vector<double> values;
  for (int64_t b = 0; b < B; ++b)
    values.push_back(b + 1 == B ? 100000 : 37. * static_cast<double>(b));
  return Tensor::of({B}, values, DType::i32);
}

TEST_P(Rotary, EqualsTheReference) {
  const RotaryCase& c = GetParam();
  const Tensor start = starts(c.B);
  const std::vector<double> zeros(static_cast<size_t>(c.B), 0);
  for (const DType dtype : test_dtypes()) {
    // Rows that the GPU takes several channels at a time, and rows that it cannot.
    for (const int64_t gap : {0, 8, 5}) {
      SCOPED_TRACE(fmt::format("{} gap {}", name_of(dtype), gap));
      Random random(1);
      Context ctx = make_context(2);
      const Tensor x = Tensor::normal(random, {c.B, c.T, c.heads * c.d}, 1, dtype, gap);
      for (const bool inverse : {false, true}) {
        const auto want = reference(c, x.values(), zeros, 10000, inverse);
        const auto want_later = reference(c, x.values(), start.values(), 500, inverse);
        for_each_instruction_set([&] {
          const Tensor first = x.copy(), later = x.copy();
          rotary(ctx, {.x = first, .d = c.d, .dims = c.dims, .inverse = inverse});
          EXPECT_TRUE(near(first, want, tolerance_of(dtype)));
          rotary(ctx, {.x = later,
                       .d = c.d,
                       .dims = c.dims,
                       .base = 500,
                       .start = start,
                       .inverse = inverse});
          EXPECT_TRUE(near(later, want_later, tolerance_of(dtype)));
        });
      }
    }
  }
}

TEST_P(Rotary, InverseOfTheGradientIsTheBackward) {
  const RotaryCase& c = GetParam();
  Random random(2);
  Context ctx = make_context(2);
  const std::vector<double> zeros(static_cast<size_t>(c.B), 0);
  const Tensor x = Tensor::normal(random, {c.B, c.T, c.heads * c.d});
  const Tensor d = Tensor::normal(random, {c.B, c.T, c.heads * c.d});
  const auto loss = [&](const std::vector<Complex>& values) {
    return dot(d.values(), reference(c, values, zeros));
  };
  const auto positions = some_positions(random, c.B * c.T * c.heads * c.d, 60);
  const auto want = complex_step(loss, x.values(), positions);
  const Tensor gradient = d.copy();
  rotary(ctx, {.x = gradient, .d = c.d, .dims = c.dims, .inverse = true});
  EXPECT_TRUE(near(gather(gradient, positions), want, tolerance_of(DType::f32)));
}

TEST_P(Rotary, InverseTurnsBack) {
  const RotaryCase& c = GetParam();
  Random random(3);
  Context ctx = make_context(2);
  const Tensor start = starts(c.B);
  for (const DType dtype : test_dtypes()) {
    const Tensor x = Tensor::normal(random, {c.B, c.T, c.heads * c.d}, 1, dtype), there = x.copy();
    RotaryArgs args{.x = there, .d = c.d, .dims = c.dims, .start = start};
    rotary(ctx, args);
    EXPECT_FALSE(near(there, x.values(), {.unit = 1e-2}));
    args.inverse = true;
    rotary(ctx, args);
    Tolerance twice = tolerance_of(dtype);
    twice.unit *= 2;
    EXPECT_TRUE(near(there, x.values(), twice));
  }
}

TEST(RotaryPositions, KeepTheNormOfEveryPair) {
  constexpr int64_t T = 50, heads = 2, d = 24, dims = 16;
  Random random(4);
  Context ctx = make_context(2);
  const Tensor x = Tensor::normal(random, {1, T, heads * d}), turned = x.copy();
  const Tensor start = Tensor::of_ids({99990});
  rotary(ctx, {.x = turned, .d = d, .dims = dims, .start = start});
  for (int64_t head = 0; head < T * heads * d; head += d) {
    for (int64_t i = 0; i < dims / 2; ++i) {
      const int64_t a = head + i, b = a + dims / 2;
      EXPECT_NEAR(std::hypot(turned.at(a), turned.at(b)), std::hypot(x.at(a), x.at(b)), 1e-6);
    }
    for (int64_t i = dims; i < d; ++i) EXPECT_EQ(turned.at(head + i), x.at(head + i));
  }
}

// q . k of a query and a key that are so far apart, wherever they are.
TEST(RotaryPositions, ScoresDependOnTheDistanceOnly) {
  constexpr int64_t d = 64, distance = 13;
  Random random(5);
  Context ctx = make_context(2);
  const Tensor q = Tensor::normal(random, {1, 1, d}), k = Tensor::normal(random, {1, 1, d});
  const auto score = [&](int32_t position) {
    const Tensor query = q.copy(), key = k.copy();
    const Tensor at = Tensor::of_ids({position + static_cast<int32_t>(distance)});
    const Tensor at_key = Tensor::of_ids({position});
    rotary(ctx, {.x = query, .d = d, .dims = d, .start = at});
    rotary(ctx, {.x = key, .d = d, .dims = d, .start = at_key});
    double sum = 0;
    const auto a = values_of(query), b = values_of(key);
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
  };
  const double here = score(0);
  for (const int32_t position : {1, 1000, 100000, 9999999}) {
    EXPECT_NEAR(score(position), here, 1e-5) << position;
  }
  double unturned = 0;
  for (int64_t i = 0; i < d; ++i) unturned += q.at(i) * k.at(i);
  EXPECT_GT(std::abs(unturned - here), 0.1);
}

// Cosine and sine themselves: of x = (1, 0), at positions where the rounding of an f32 angle is
// larger than 0.001 to 0.25.
TEST(RotaryPositions, AnglesAreExactFarOut) {
  constexpr int64_t dims = 128;
  Context ctx = make_context(2);
  for (const int32_t position : {100000, 1 << 20, 5000011}) {
    SCOPED_TRACE(position);
    Tensor x = Tensor::zeros({1, 7, dims});
    for (int64_t t = 0; t < 7; ++t) {
      for (int64_t i = 0; i < dims / 2; ++i) x.set(t * dims + i, 1);
    }
    const auto want = ref::rotary(x.values(), dims, dims, dims, 10000, position);
    const Tensor start = Tensor::of_ids({position});
    rotary(ctx, {.x = x, .d = dims, .dims = dims, .start = start});
    const auto got = values_of(x);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i], want[i], 6.1e-8) << i;  // 2^-24
  }
}

TEST_P(Rotary, ContinuedEqualsTheWhole) {
  const RotaryCase& c = GetParam();
  Random random(6);
  Context ctx = make_context(2);
  for (const DType dtype : test_dtypes()) {
    const Tensor x = Tensor::normal(random, {c.B, c.T, c.heads * c.d}, 1, dtype);
    const Tensor whole = x.copy(), parts = x.copy();
    rotary(ctx, {.x = whole, .d = c.d, .dims = c.dims});
    for (int64_t from = 0, length = 1; from < c.T; from += length, ++length) {
      const std::vector<double> past(static_cast<size_t>(c.B), static_cast<double>(from));
      const Tensor start = Tensor::of({c.B}, past, DType::i32);
      rotary(ctx, {.x = parts.view().slice(1, from, std::min(c.T, from + length)),
                   .d = c.d,
                   .dims = c.dims,
                   .start = start});
    }
    EXPECT_TRUE(same_bits(parts, whole));
  }
}

TEST_P(Rotary, PackedSequencesEqualSeparateOnes) {
  RotaryCase c = GetParam();
  const std::vector<int64_t> cuts = {0, 0, 1, 5, 5, 18, 19};
  c.B = 1, c.T = cuts.back();
  const int64_t sequences = static_cast<int64_t>(cuts.size()) - 1;
  Random random(7);
  Context ctx = make_context(2);
  const Tensor cu = Tensor::of_ids({0, 0, 1, 5, 5, 18, 19}), start = starts(sequences);
  for (const bool with_start : {false, true}) {
    const Tensor x = Tensor::normal(random, {1, c.T, c.heads * c.d});
    const Tensor packed = x.copy(), separate = x.copy();
    rotary(ctx, {.x = packed,
                 .d = c.d,
                 .dims = c.dims,
                 .cu_seqlens = cu,
                 .start = with_start ? start.view() : View{}});
    for (int64_t i = 0; i < sequences; ++i) {
      rotary(ctx, {.x = separate.view().slice(1, cuts[static_cast<size_t>(i)],
                                              cuts[static_cast<size_t>(i + 1)]),
                   .d = c.d,
                   .dims = c.dims,
                   .start = with_start ? start.view().slice(0, i, i + 1) : View{}});
    }
    EXPECT_TRUE(same_bits(packed, separate));
  }
}

// The queries and keys of a projection [q, k, v], whose values stay.
TEST(RotaryColumns, OthersStay) {
  constexpr int64_t B = 2, T = 9, d = 16, Hq = 4, Hkv = 2;
  Random random(8);
  Context ctx = make_context(2);
  for (const DType dtype : test_dtypes()) {
    const Tensor qkv = Tensor::normal(random, {B, T, (Hq + 2 * Hkv) * d}, 1, dtype);
    const Tensor turned = qkv.copy();
    const int64_t columns = (Hq + Hkv) * d;
    const View x = turned.view().slice(2, 0, columns);
    rotary(ctx, {.x = x, .d = d, .dims = d});
    const RotaryCase c{.B = B, .T = T, .heads = Hq + Hkv, .d = d, .dims = d};
    EXPECT_TRUE(near(x, reference(c, values_of(qkv.view().slice(2, 0, columns)), {0, 0}),
                     tolerance_of(dtype)));
    EXPECT_TRUE(same_bits(turned.view().slice(2, columns, columns + Hkv * d),
                          qkv.view().slice(2, columns, columns + Hkv * d)));
  }
}

// More tokens than the GPU's blocks take at a time, of several rows.
TEST(RotarySizes, ManyTokensEqualTheReference) {
  const RotaryCase c{.B = 3, .T = 2501, .heads = 2, .d = 8, .dims = 8};
  Random random(9);
  Context ctx = make_context(2);
  const Tensor start = starts(c.B);
  for (const DType dtype : test_dtypes()) {
    const Tensor x = Tensor::normal(random, {c.B, c.T, c.heads * c.d}, 1, dtype);
    const auto want = reference(c, x.values(), start.values());
    rotary(ctx, {.x = x, .d = c.d, .dims = c.dims, .start = start});
    EXPECT_TRUE(near(x, want, tolerance_of(dtype)));
  }
}

TEST(RotaryThreads, DoNotChangeABit) {
  Random random(10);
  const Tensor x = Tensor::normal(random, {2, 300, 96}), one = x.copy();
  Context ctx = make_context(1);
  rotary(ctx, {.x = one, .d = 48, .dims = 32});
  for (const int threads : {2, 3}) {
    Context many = make_context(threads);
    const Tensor other = x.copy();
    rotary(many, {.x = other, .d = 48, .dims = 32});
    EXPECT_TRUE(same_bits(other, one));
  }
}

TEST(RotaryNaN, StaysInItsPair) {
  Context ctx = make_context(1);
  Tensor x = Tensor::zeros({1, 2, 12});
  x.set(12 + 7, std::nan(""));  // head 1 of token 1, channel 1, which turns with channel 3
  rotary(ctx, {.x = x, .d = 6, .dims = 4});
  const auto values = values_of(x);
  for (size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(std::isnan(values[i]), i == 19 || i == 21) << i;
  }
}

TEST(RotaryEmpty, NoTokens) {
  Context ctx = make_context(1);
  const Tensor x({1, 0, 8}), cu = Tensor::of_ids({0, 0});
  rotary(ctx, {.x = x, .d = 8, .dims = 8});
  rotary(ctx, {.x = x, .d = 8, .dims = 8, .cu_seqlens = cu});
}

TEST(RotaryErrors, NameTheArgument) {
  Context ctx = make_context(1);
  const Tensor x = Tensor::zeros({2, 3, 24}), start = Tensor::of_ids({0, 5});
  const RotaryArgs good{.x = x, .d = 8, .dims = 6, .start = start};
  const auto message = [&](auto change) {
    RotaryArgs args = good;
    change(args);
    return input_error_of([&] { rotary(ctx, args); });
  };
  EXPECT_EQ(message([](auto&) {}), "nothing thrown");
  EXPECT_EQ(message([](auto& a) { a.x = {}; }), "[rotary] x is missing");
  EXPECT_EQ(message([&](auto& a) { a.x = start; }),
            "[rotary] dtype of x: got i32, want f32" +
                std::string(test_device() == Device::cpu ? "" : " or bf16"));
  EXPECT_EQ(message([](auto& a) { a.d = 0; }), "[rotary] 24 columns of x are no heads of 0");
  EXPECT_EQ(message([](auto& a) { a.d = 7; }), "[rotary] 24 columns of x are no heads of 7");
  for (const int64_t dims : {0, 5, 10}) {
    EXPECT_EQ(message([&](auto& a) { a.dims = dims; }),
              fmt::format("[rotary] dims is {}, want an even number from 2 to 8", dims));
  }
  EXPECT_EQ(message([](auto& a) { a.base = 0; }), "[rotary] base is 0, want a positive number");
  EXPECT_EQ(message([](auto& a) { a.base = std::nan(""); }),
            "[rotary] base is nan, want a positive number");
  EXPECT_EQ(message([&](auto& a) { a.cu_seqlens = start; }),
            "[rotary] cu_seqlens needs B = 1 and at least one entry");
  EXPECT_EQ(message([&](auto& a) { a.start = start.view().slice(0, 0, 1); }),
            "[rotary] dim 0 of start: got 1, want 2");
  if (test_device() == Device::cpu) {
    const Tensor before = Tensor::of_ids({0, -1});
    EXPECT_EQ(message([&](auto& a) { a.start = before; }),
              "[rotary] start[1] is -1, want 0 <= value < 2147483648");
  }
}

}  // namespace
}  // namespace mamba3::testing
