#include "core/scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mamba3 {
namespace {

TEST(Scratch, PiecesAreAlignedAndApart) {
  Scratch scratch;
  const ScratchScope scope(scratch);
  std::vector<std::span<char>> pieces;
  for (const int64_t n : {1, 63, 64, 65, 0, 100'000, 3'000'000}) {
    pieces.push_back(scratch.take<char>(n));
    ASSERT_EQ(pieces.back().size(), static_cast<size_t>(n));
    EXPECT_EQ(reinterpret_cast<uintptr_t>(pieces.back().data()) % 64, 0u);
  }
  // Each piece keeps its own mark when all are written.
  for (size_t i = 0; i < pieces.size(); ++i) {
    std::fill(pieces[i].begin(), pieces[i].end(), static_cast<char>(i));
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    EXPECT_EQ(std::count(pieces[i].begin(), pieces[i].end(), static_cast<char>(i)),
              static_cast<int64_t>(pieces[i].size()));
  }
}

TEST(Scratch, SizesCountElementsNotBytes) {
  Scratch scratch;
  const ScratchScope scope(scratch);
  const std::span<double> a = scratch.take<double>(100);
  const std::span<double> b = scratch.take<double>(100);
  ASSERT_EQ(a.size(), 100u);
  EXPECT_GE(b.data(), a.data() + 100);
}

TEST(Scratch, ScopeGivesBackWhatItTook) {
  Scratch scratch;
  const ScratchScope outer(scratch);
  const std::span<int> kept = scratch.take<int>(10);
  std::fill(kept.begin(), kept.end(), 42);
  int* first = nullptr;
  for (int i = 0; i < 3; ++i) {
    ScratchScope inner(scratch);
    const std::span<int> piece = inner.take<int>(1000);
    std::fill(piece.begin(), piece.end(), i);
    if (i == 0) first = piece.data();
    EXPECT_EQ(piece.data(), first);  // the same memory each time
  }
  EXPECT_EQ(std::count(kept.begin(), kept.end(), 42), 10);
}

TEST(Scratch, GrowingInAnInnerScopeKeepsTheOuterPieces) {
  Scratch scratch;
  {
    const ScratchScope outer(scratch);
    const std::span<int> kept = scratch.take<int>(1000);
    std::fill(kept.begin(), kept.end(), 7);
    {
      const ScratchScope inner(scratch);
      const std::span<int> large = scratch.take<int>(5'000'000);
      std::fill(large.begin(), large.end(), 0);
    }
    const std::span<int> after = scratch.take<int>(5'000'000);
    std::fill(after.begin(), after.end(), 1);
    EXPECT_EQ(std::count(kept.begin(), kept.end(), 7), 1000);
  }
  EXPECT_GE(scratch.capacity(), 20'000'000u);
}

TEST(Scratch, SteadyStateAllocatesNothing) {
  Scratch scratch;
  const auto op = [&scratch](int64_t n) {
    const ScratchScope scope(scratch);
    scratch.take<float>(n);
    for (int block = 0; block < 3; ++block) {
      const ScratchScope inner(scratch);
      scratch.take<float>(2 * n);
      scratch.take<char>(n / 2);
    }
    scratch.take<double>(n);
  };
  op(400'000);
  const int64_t first_run = scratch.allocations();
  EXPECT_GT(first_run, 1);  // it grew by several blocks, merged at the end
  const size_t capacity = scratch.capacity();
  for (int run = 0; run < 10; ++run) op(400'000);
  op(1000);
  EXPECT_EQ(scratch.allocations(), first_run);
  EXPECT_EQ(scratch.capacity(), capacity);
}

TEST(Scratch, OpsOneAfterTheOtherShareTheirMemory) {
  Scratch scratch;
  for (const int64_t bytes : {2'000'000, 5'000'000, 3'000'000}) {
    const ScratchScope scope(scratch);
    scratch.take<char>(bytes);
  }
  EXPECT_GE(scratch.capacity(), 5'000'000u);
  EXPECT_LT(scratch.capacity(), 5'001'000u);
}

TEST(Scratch, ExceptionUnwindsTheScopes) {
  Scratch scratch;
  const void* first = nullptr;
  for (int i = 0; i < 2; ++i) {
    try {
      const ScratchScope outer(scratch);
      const ScratchScope inner(scratch);
      const void* piece = scratch.take<float>(100).data();
      if (i == 0) first = piece;
      EXPECT_EQ(piece, first);
      throw 1;
    } catch (int) {
    }
  }
}

}  // namespace
}  // namespace mamba3
