#include "cli/progress.h"

#include <gtest/gtest.h>
#include <pty.h>
#include <unistd.h>

#include <array>
#include <stdexcept>

namespace mamba3::cli {
namespace {

constexpr ProgressState kHalf{.label = "train",
                              .unit = "tokens",
                              .first = 0,
                              .done = 500'000,
                              .total = 1'000'000,
                              .seconds = 50,
                              .detail = "loss 2.310"};

TEST(Progress, CountsAreShort) {
  EXPECT_EQ(short_count(0), "0");
  EXPECT_EQ(short_count(7), "7");
  EXPECT_EQ(short_count(7.25), "7.25");
  EXPECT_EQ(short_count(42.66), "42.7");
  EXPECT_EQ(short_count(999), "999");
  EXPECT_EQ(short_count(999.9), "1.00k");
  EXPECT_EQ(short_count(12'345), "12.3k");
  EXPECT_EQ(short_count(99'960), "100k");
  EXPECT_EQ(short_count(186'849'600), "187M");
  EXPECT_EQ(short_count(3e12), "3.00T");
}

TEST(Progress, TimesReadLikeAClock) {
  EXPECT_EQ(clock_time(0), "0:00");
  EXPECT_EQ(clock_time(59.4), "0:59");
  EXPECT_EQ(clock_time(59.6), "1:00");
  EXPECT_EQ(clock_time(728), "12:08");
  EXPECT_EQ(clock_time(3723), "1:02:03");
  EXPECT_EQ(clock_time(-1), "0:00");
}

TEST(Progress, LineHasAllTheNumbers) {
  EXPECT_EQ(progress_line(kHalf),
            "train  50%  500k/1.00M tokens  10.0k tokens/s  loss 2.310  0:50 left");
}

TEST(Progress, BarFillsWithTheFraction) {
  EXPECT_EQ(progress_bar(kHalf, 90),
            "train  50% [==========>         ] 500k/1.00M tokens  10.0k tokens/s  loss 2.310  "
            "0:50 left");
}

TEST(Progress, NarrowTerminalDropsTheBarAndThenText) {
  EXPECT_EQ(progress_bar(kHalf, 70), progress_line(kHalf));
  EXPECT_EQ(progress_bar(kHalf, 20), progress_line(kHalf).substr(0, 20));
  EXPECT_EQ(progress_bar(kHalf, 0), "");
}

TEST(Progress, HundredPercentMeansDone) {
  ProgressState state = kHalf;
  state.done = 999'999;
  EXPECT_EQ(progress_line(state).substr(0, 10), "train  99%");
  state.done = state.total;
  EXPECT_EQ(progress_line(state),
            "train 100%  1.00M/1.00M tokens  20.0k tokens/s  loss 2.310  0:50");
  EXPECT_EQ(progress_bar(state, 200).find('>'), std::string::npos);
  state.done = 2 * state.total;  // more than announced
  EXPECT_EQ(progress_line(state).substr(0, 10), "train 100%");
}

TEST(Progress, ResumedWorkDoesNotCountAsSpeed) {
  ProgressState state = kHalf;
  state.first = 400'000;
  EXPECT_EQ(progress_line(state),
            "train  50%  500k/1.00M tokens  2.00k tokens/s  loss 2.310  4:10 left");
}

TEST(Progress, UnknownTotalAndNoRateYet) {
  EXPECT_EQ(progress_line({.label = "read", .unit = "bytes", .done = 0, .detail = {}}),
            "read  0 bytes");
  EXPECT_EQ(
      progress_bar({.label = "read", .unit = "bytes", .done = 50, .seconds = 5, .detail = {}}, 80),
      "read  50 bytes  10 bytes/s");
}

std::string written_to(FILE* file) {
  std::rewind(file);
  std::array<char, 4096> buffer;
  return {buffer.data(), std::fread(buffer.data(), 1, buffer.size(), file)};
}

TEST(Progress, FileGetsOneLineForShortWork) {
  FILE* file = std::tmpfile();
  {
    Progress progress("train", "steps", 3, 0, file);
    for (int step = 1; step <= 3; ++step) progress.update(step, "loss 1.0");
    progress.hide();  // nothing to hide
    progress.finish();
    progress.finish();
  }
  const std::string text = written_to(file);
  EXPECT_EQ(text.find("train 100%  3/3 steps"), 0u) << text;
  EXPECT_EQ(text.find('\n'), text.size() - 1) << text;
  EXPECT_EQ(text.find('\x1b'), std::string::npos) << text;
  std::fclose(file);
}

TEST(Progress, ExceptionLeavesTheStateThatWasReached) {
  FILE* file = std::tmpfile();
  try {
    Progress progress("train", "steps", 4, 0, file);
    progress.update(1);
    throw std::runtime_error("disk full");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(written_to(file).find("train  25%  1/4 steps"), 0u);
  std::fclose(file);
}

TEST(Progress, TerminalGetsABarThatIsRedrawnInPlace) {
  int master = -1, slave = -1;
  const winsize size{.ws_row = 24, .ws_col = 120, .ws_xpixel = 0, .ws_ypixel = 0};
  ASSERT_EQ(openpty(&master, &slave, nullptr, nullptr, &size), 0);
  FILE* terminal = fdopen(slave, "w");
  {
    Progress progress("train", "steps", 2, 0, terminal);
    progress.update(1);  // drawn
    progress.update(1);  // too soon
    progress.hide();
    progress.update(2);
  }
  std::fclose(terminal);
  std::string text;  // until the read fails because the other side is closed
  std::array<char, 4096> buffer;
  for (ssize_t n = 0; (n = read(master, buffer.data(), buffer.size())) > 0;) {
    text.append(buffer.data(), static_cast<size_t>(n));
  }
  close(master);
  int draws = 0;
  for (size_t at = 0; (at = text.find("\rtrain", at)) != std::string::npos; ++at) ++draws;
  EXPECT_EQ(draws, 3) << text;  // the first, after hide(), the last
  EXPECT_NE(text.find('['), std::string::npos);
  EXPECT_TRUE(text.ends_with("\r\n")) << text;
}

}  // namespace
}  // namespace mamba3::cli
