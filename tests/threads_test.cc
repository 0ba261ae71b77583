#include "core/threads.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
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
  for (const int threads : kThreadCounts) {
    ThreadPool pool(threads);
    for (int loop = 0; loop < 10'000; ++loop) {
      std::atomic<int> sum = 0;  // gone before a late worker of this loop could add to it
      pool.parallel_for(8, 1, [&](int64_t begin, int64_t, int) { sum += static_cast<int>(begin); });
      ASSERT_EQ(sum, 28) << "loop " << loop << " with " << threads << " threads";
    }
  }
}

TEST(ThreadPool, LoopsDoNotWaitForWorkersThatAreNotRunning) {
  // 64 threads on a few cores: were each waited for in each loop, this would take minutes.
  ThreadPool pool(64);
  const auto begin = std::chrono::steady_clock::now();
  for (int loop = 0; loop < 2'000; ++loop) {
    pool.parallel_for(2, 1, [](int64_t, int64_t, int) {});
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

// A pool may end while workers are still waking up for its last loop.
TEST(ThreadPool, StopsRightAfterALoop) {
  for (int i = 0; i < 500; ++i) {
    ThreadPool pool(4);
    pool.parallel_for(8, 1, [](int64_t, int64_t, int) {});
  }
}

TEST(ThreadPool, AllThreadsTakePart) {
  // Every range waits until the others have begun, which takes as many threads.
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  std::atomic<int> begun = 0, threads_seen = 0;
  pool.parallel_for(kThreads, 1, [&](int64_t, int64_t, int thread) {
    ++begun;
    threads_seen |= 1 << thread;
    while (begun < kThreads && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(threads_seen, (1 << kThreads) - 1);
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

TEST(ThreadPoolDeathTest, AThreadThatCannotStartIsAnError) {
#ifdef MAMBA3_SANITIZED
  GTEST_SKIP() << "the address sanitizer needs more address space than this test leaves";
#else
  const auto pool_without_memory = [] {
    const rlimit little{.rlim_cur = size_t{256} << 20, .rlim_max = size_t{256} << 20};
    setrlimit(RLIMIT_AS, &little);
    try {
      ThreadPool pool(1000);
    } catch (const Error& error) {
      std::fputs(error.what(), stderr);
      std::_Exit(3);
    }
  };
  EXPECT_EXIT(pool_without_memory(), ::testing::ExitedWithCode(3),
              "cannot start thread .* of 1000: Resource temporarily unavailable");
#endif
}

}  // namespace
}  // namespace mamba3
