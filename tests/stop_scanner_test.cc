#include "infer/stop_scanner.h"

#include <gtest/gtest.h>

#include "support/errors.h"

namespace mamba3::testing {
namespace {

// What is shown of a text that comes one character at a time.
std::string shown(StopScanner& scanner, std::string_view text) {
  std::string out;
  for (const char c : text) out += scanner.push({&c, 1});
  return out;
}

TEST(StopScanner, ShowsAllWithoutStops) {
  StopScanner scanner({});
  EXPECT_EQ(scanner.push("abc"), "abc");
  EXPECT_FALSE(scanner.stopped());
  EXPECT_EQ(scanner.finish(), "");
}

TEST(StopScanner, CutsBeforeTheStop) {
  StopScanner scanner({"END"});
  EXPECT_EQ(scanner.push("one END two"), "one ");
  EXPECT_TRUE(scanner.stopped());
  EXPECT_EQ(scanner.push("three"), "");
  EXPECT_EQ(scanner.finish(), "");
}

TEST(StopScanner, HoldsBackWhatMayBecomeAStop) {
  StopScanner scanner({"\n\nUser:"});
  EXPECT_EQ(scanner.push("hello\n"), "hello");
  EXPECT_EQ(scanner.push("\nUs"), "");
  EXPECT_EQ(scanner.push("e it"), "\n\nUse it");  // it was not one
  EXPECT_EQ(scanner.push("\n\nUser: x"), "");
  EXPECT_TRUE(scanner.stopped());
}

TEST(StopScanner, FindsAStopThatBeginsInsideAFalseStart) {
  StopScanner scanner({"aab"});
  EXPECT_EQ(shown(scanner, "xaaab"), "xa");
  EXPECT_TRUE(scanner.stopped());
}

TEST(StopScanner, TheEarliestOfSeveralStopsCounts) {
  StopScanner scanner({"three", "two", "owl"});
  EXPECT_EQ(scanner.push("one two three"), "one ");
  StopScanner overlapping({"abcd", "bc"});
  EXPECT_EQ(shown(overlapping, "zabcd"), "za");
}

TEST(StopScanner, GivesBackTheRestAtTheEnd) {
  StopScanner scanner({"stop"});
  EXPECT_EQ(scanner.push("no sto"), "no ");
  EXPECT_EQ(scanner.finish(), "sto");
  EXPECT_EQ(scanner.finish(), "");
}

TEST(StopScanner, RefusesAnEmptyStop) {
  EXPECT_EQ(input_error_of([] { StopScanner({"a", ""}); }), "a stop text must not be empty");
}

}  // namespace
}  // namespace mamba3::testing
