#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace mamba3 {

// A fixed set of worker threads for data-parallel loops. One loop runs at a time; the calling
// thread takes part in it as thread 0. Between loops workers spin for some microseconds and then
// sleep.
class ThreadPool {
 public:
  static constexpr int kMostThreads = 1024;

  // 0 threads: as many as the process may use. Throws InputError for a number below 0 or above
  // kMostThreads, Error if the system cannot start them.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(begin, end, thread) for ranges of `grain` items (the last may be shorter) that cover
  // [0, n), each range once, in no fixed order, thread in [0, size()). The ranges depend on n and
  // grain only, so a body that writes disjoint results gives the same bits for any number of
  // threads. An exception in a body is rethrown here after the loop. Loops must not be nested.
  template <typename Body>
  void parallel_for(int64_t n, int64_t grain, Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run(
        n, grain < 1 ? 1 : grain,
        [](void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<Plain*>(context))(begin, end, thread);
        },
        const_cast<void*>(static_cast<const void*>(&body)));
  }

 private:
  using Call = void (*)(void* context, int64_t begin, int64_t end, int thread);
  struct Loop;
  void run(int64_t n, int64_t grain, Call call, void* context);
  void work(int thread);
  void stop();
  void claim_ranges(int thread);

  std::unique_ptr<Loop> loop_;
  std::atomic<uint32_t> generation_{0};  // counts loops: what workers wait for
  std::atomic<bool> stop_{false};
  std::vector<std::thread> workers_;
};

}  // namespace mamba3
