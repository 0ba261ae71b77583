#include "core/random.h"

#include <gtest/gtest.h>

#include <limits>

namespace mamba3 {
namespace {

// Known answers published with the Random123 library.
TEST(Random, PhiloxKnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0),
            (std::array<uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint64_t ones = std::numeric_limits<uint64_t>::max();
  EXPECT_EQ(philox(ones, ones, ones),
            (std::array<uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox(0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88),
            (std::array<uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, NamedSequencesRepeatAndDiffer) {
  Random a(7, 3, 1), b(7, 3, 1), row(7, 3, 2), stream(7, 4, 1), seed(8, 3, 1);
  for (int i = 0; i < 9; ++i) {
    const uint32_t value = a.bits();
    EXPECT_EQ(value, b.bits());
    EXPECT_NE(value, row.bits());
    EXPECT_NE(value, stream.bits());
    EXPECT_NE(value, seed.bits());
  }
  EXPECT_NE(derive_seed(7, "data"), derive_seed(7, "init"));
  EXPECT_NE(derive_seed(7, "data"), derive_seed(8, "data"));
}

TEST(Random, Moments) {
  Random random(1);
  constexpr int kDraws = 200000;
  double sum = 0, squares = 0, uniform = 0;
  std::array<int, 5> counts{};
  for (int i = 0; i < kDraws; ++i) {
    const double x = random.normal();
    sum += x;
    squares += x * x;
    uniform += random.uniform();
    ++counts.at(static_cast<size_t>(random.below(5)));
  }
  // Five standard errors each.
  EXPECT_NEAR(sum / kDraws, 0, 0.0112);
  EXPECT_NEAR(squares / kDraws, 1, 0.0158);
  EXPECT_NEAR(uniform / kDraws, 0.5, 0.0033);
  for (const int count : counts) EXPECT_NEAR(count, kDraws / 5, 900);
}

}  // namespace
}  // namespace mamba3
