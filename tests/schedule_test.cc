#include "train/schedule.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/error.h"

namespace mamba3 {
namespace {

Schedule schedule(Decay decay) {
  return {.decay = decay, .peak = 1.0, .floor = 0.1, .warmup = 0.1, .tail = 0.2};
}

TEST(Schedule, WarmsUpFromZeroToThePeak) {
  for (const Decay decay : {Decay::cosine, Decay::wsd, Decay::constant}) {
    const Schedule s = schedule(decay);
    EXPECT_DOUBLE_EQ(s.at(0), 0);
    EXPECT_DOUBLE_EQ(s.at(0.05), 0.5);
    EXPECT_DOUBLE_EQ(s.at(0.1), 1);
  }
}

TEST(Schedule, CosineHalvesInTheMiddleAndEndsAtTheFloor) {
  const Schedule s = schedule(Decay::cosine);
  EXPECT_NEAR(s.at(0.55), 0.55, 1e-12);  // halfway between peak and floor
  EXPECT_NEAR(s.at(0.325), 0.1 + 0.9 * 0.85355339059327378, 1e-12);
  EXPECT_NEAR(s.at(1), 0.1, 1e-12);
  EXPECT_NEAR(s.at(1.5), 0.1, 1e-12);  // a run may go past its time budget
}

TEST(Schedule, WsdIsFlatAndThenALine) {
  const Schedule s = schedule(Decay::wsd);
  EXPECT_DOUBLE_EQ(s.at(0.5), 1);
  EXPECT_DOUBLE_EQ(s.at(0.8), 1);
  EXPECT_NEAR(s.at(0.9), 0.55, 1e-12);
  EXPECT_NEAR(s.at(1), 0.1, 1e-12);
}

TEST(Schedule, ConstantStaysAtThePeak) {
  EXPECT_DOUBLE_EQ(schedule(Decay::constant).at(1), 1);
}

TEST(Schedule, WithoutWarmUpOrTail) {
  Schedule s = schedule(Decay::wsd);
  s.warmup = s.tail = 0;
  EXPECT_DOUBLE_EQ(s.at(0), 1);
  EXPECT_DOUBLE_EQ(s.at(1), 1);
  s.decay = Decay::cosine;
  s.warmup = 1;
  EXPECT_DOUBLE_EQ(s.at(1), 0.1);
}

TEST(Schedule, NamesReadBack) {
  for (const Decay decay : {Decay::cosine, Decay::wsd, Decay::constant}) {
    EXPECT_EQ(parse_decay(name_of(decay)), decay);
  }
  EXPECT_THROW(parse_decay("linear"), InputError);
}

TEST(Schedule, RefusesNonsense) {
  const auto refused = [](auto change) {
    Schedule s;
    change(s);
    EXPECT_THROW(s.check(), InputError);
  };
  EXPECT_NO_THROW(Schedule().check());
  refused([](Schedule& s) { s.peak = 0; });
  refused([](Schedule& s) { s.peak = std::numeric_limits<double>::quiet_NaN(); });
  refused([](Schedule& s) { s.floor = -1; });
  refused([](Schedule& s) { s.floor = 2 * s.peak; });
  refused([](Schedule& s) { s.warmup = 1.5; });
  refused([](Schedule& s) { s.tail = -0.1; });
}

}  // namespace
}  // namespace mamba3
