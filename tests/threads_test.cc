#include "core/threads.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "mamba3/error.h"

namespace mamba3 {
namespace {

// More threads than this machine has cores, too: ranges must not depend on who gets to run.
constexpr int kThreadCounts[] = {1, 2, 3, 8};

TEST(ThreadPool, EveryItemIsVisitedOnceInRangesOfTheGrain) {
  for (const int threads : kThreadCounts) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (const int64_t n : {0, 1, 7, 64, 1000}) {
      for (const int64_t grain : {1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> visits(static_cast<size_t>(n));
        std::atomic<int> wrong_ranges = 0;
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
          const bool valid = begin % grain == 0 && end == std::min(n, begin + grain) &&
                             0 <= thread && thread < threads;
          if (!valid) ++wrong_ranges;
          for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
        });
        EXPECT_EQ(wrong_ranges, 0);
        for (const auto& count : visits) {
          ASSERT_EQ(count, 1) << "threads " << threads << ", n " << n << ", grain " << grain;
        }
      }
    }
  }
}

TEST(ThreadPool, GrainBelowOneIsOne) {
  ThreadPool pool(2);
  std::atomic<int> calls = 0;
  pool.parallel_for(5, 0, [&](int64_t begin, int64_t end, int) {
    EXPECT_EQ(end, begin + 1);
    ++calls;
  });
  EXPECT_EQ(calls, 5);
}

TEST(ThreadPool, ResultsAreTheSameBitsForAnyNumberOfThreads) {
  // Sums of ranges in float, whose bits depend on where the ranges begin.
  const auto partial_sums = [](int threads) {
    ThreadPool pool(threads);
    std::vector<float> sums(77);
    pool.parallel_for(1000, 13, [&](int64_t begin, int64_t end, int) {
      float sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += std::sin(static_cast<float>(i));
      sums[static_cast<size_t>(begin / 13)] = sum;
    });
    return sums;
  };
  const std::vector<float> alone = partial_sums(1);
  for (const int threads : kThreadCounts) EXPECT_EQ(partial_sums(threads), alone) << threads;
}

TEST(ThreadPool, ManySmallLoopsLoseNothing) {
  ThreadPool pool(4);
  int64_t total = 0;
  for (int loop = 0; loop < 20'000; ++loop) {
    std::atomic<int64_t> sum = 0;
    pool.parallel_for(8, 1, [&](int64_t begin, int64_t, int) { sum += begin; });
    total += sum;
  }
  EXPECT_EQ(total, int64_t{20'000} * 28);
}

TEST(ThreadPool, WorkersWakeUpAfterAPause) {
  ThreadPool pool(3);
  for (int loop = 0; loop < 5; ++loop) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // long enough to stop spinning
    std::atomic<int> items = 0;
    pool.parallel_for(100, 1, [&](int64_t, int64_t, int) { ++items; });
    EXPECT_EQ(items, 100);
  }
}

TEST(ThreadPool, ExceptionOfABodyIsRethrownAndThePoolLivesOn) {
  for (const int threads : kThreadCounts) {
    ThreadPool pool(threads);
    for (int repeat = 0; repeat < 100; ++repeat) {
      try {
        pool.parallel_for(50, 1, [](int64_t begin, int64_t, int) {
          if (begin == 31) throw InputError("item 31");
        });
        FAIL() << "nothing was thrown with " << threads << " threads";
      } catch (const InputError& error) {
        EXPECT_STREQ(error.what(), "item 31");
      }
    }
    std::atomic<int> items = 0;
    pool.parallel_for(50, 1, [&](int64_t, int64_t, int) { ++items; });
    EXPECT_EQ(items, 50);
  }
}

TEST(ThreadPool, EveryRangeThrowingGivesOneException) {
  ThreadPool pool(4);
  EXPECT_THROW(pool.parallel_for(
                   64, 1, [](int64_t, int64_t, int) { throw std::runtime_error("all of them"); }),
               std::runtime_error);
}

TEST(ThreadPool, ZeroMeansTheUsableCpus) {
  EXPECT_GE(ThreadPool(0).size(), 1);
  EXPECT_LE(ThreadPool(0).size(), ThreadPool::kMostThreads);
}

TEST(ThreadPool, AbsurdCountsAreInputErrors) {
  const auto message = [](int threads) -> std::string {
    try {
      ThreadPool pool(threads);
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(-1), "the number of threads must be from 0 (all) to 1024, got -1");
  EXPECT_EQ(message(1'000'000), "the number of threads must be from 0 (all) to 1024, got 1000000");
}

}  // namespace
}  // namespace mamba3
