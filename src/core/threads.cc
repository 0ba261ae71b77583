#include "core/threads.h"

#include <sched.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <system_error>

#include "core/error.h"

namespace mamba3 {

namespace {

constexpr int kSpins = 4000;  // some 200 us: longer than the gap between two ops of a decode step

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int usable_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

struct ThreadPool::Loop {
  int64_t n = 0;
  int64_t grain = 1;
  Call call = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<int64_t> next{0};
  // The number of workers inside this loop, plus kClosed when no more may enter. A worker that is
  // slow to wake up is not waited for: the others have done its part.
  alignas(64) std::atomic<uint32_t> inside{kClosed};
  static constexpr uint32_t kClosed = uint32_t{1} << 31;
  std::mutex failure_mutex;
  std::exception_ptr failure;
};

ThreadPool::ThreadPool(int threads) : loop_(std::make_unique<Loop>()) {
  if (threads < 0 || threads > kMostThreads) {
    input_error("the number of threads must be from 0 (all) to {}, got {}", kMostThreads, threads);
  }
  const int count = threads == 0 ? std::min(usable_cpus(), kMostThreads) : threads;
  try {
    for (int thread = 1; thread < count; ++thread) {
      workers_.emplace_back([this, thread] { work(thread); });
    }
  } catch (const std::system_error& failure) {
    const size_t started = workers_.size();
    stop();
    error("cannot start thread {} of {}: {}", started + 2, count, failure.code().message());
  }
}

ThreadPool::~ThreadPool() {
  stop();
}

void ThreadPool::stop() {
  stop_ = true;
  ++generation_;
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::claim_ranges(int thread) {
  Loop& loop = *loop_;
  for (;;) {
    const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
    if (begin >= loop.n) return;
    try {
      loop.call(loop.context, begin, std::min(loop.n, begin + loop.grain), thread);
    } catch (...) {
      const std::lock_guard lock(loop.failure_mutex);
      if (!loop.failure) loop.failure = std::current_exception();
    }
  }
}

void ThreadPool::run(int64_t n, int64_t grain, Call call, void* context) {
  if (n <= 0) return;
  if (workers_.empty() || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) {
      call(context, begin, std::min(n, begin + grain), 0);
    }
    return;
  }
  Loop& loop = *loop_;
  loop.n = n;
  loop.grain = grain;
  loop.call = call;
  loop.context = context;
  loop.failure = nullptr;
  loop.next.store(0, std::memory_order_relaxed);
  loop.inside.fetch_and(~Loop::kClosed, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  claim_ranges(0);
  loop.inside.fetch_or(Loop::kClosed, std::memory_order_acquire);
  for (int spin = 0; loop.inside.load(std::memory_order_acquire) != Loop::kClosed; ++spin) {
    if (spin < kSpins) {
      pause_cpu();
    } else {
      std::this_thread::yield();
    }
  }
  if (loop.failure) std::rethrow_exception(loop.failure);
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen;
         ++spin) {
      pause_cpu();
    }
    generation_.wait(seen, std::memory_order_acquire);
    // In this order: a stop that comes after the load has another generation to wake up for.
    seen = generation_.load(std::memory_order_acquire);
    if (stop_) return;
    if ((loop_->inside.fetch_add(1, std::memory_order_acquire) & Loop::kClosed) == 0) {
      claim_ranges(thread);
    }
    loop_->inside.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace mamba3
