#include "emulator.h"

#include <algorithm>
#include <array>
#include <boost/context/fiber.hpp>
#include <boost/context/pooled_fixedsize_stack.hpp>
#include <mutex>
#include <random>
#include <stdexcept>
#include <vector>

namespace mamba3::emulation {

const Position* position = nullptr;
alignas(1024) char dynamic_shared[kSharedBytes];

namespace {

namespace context = boost::context;

constexpr size_t kStackBytes = 256 << 10;

// Where a group of threads waits for all of it. `passed` counts how often it was.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned passed = 0;

  void pass_if_complete() {
    if (arrived == 0 || arrived < expected) return;
    arrived = 0;
    ++passed;
  }
};

struct Thread {
  context::fiber fiber;
  context::fiber* scheduler = nullptr;  // that goes on when this waits
  Position position;
  int warp = 0, lane = 0;
  bool ended = false;
  const Barrier* at = nullptr;  // that it waits at
  unsigned passed = 0;          // how often that had been passed when it came
  // What it has shown to its warp, so many times: what came last, and before that.
  alignas(16) std::array<char, kMostPosted> posts[2];
  int posted = 0;

  bool waits() const { return at != nullptr && at->passed == passed; }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  int yes[3] = {0, 0, 0};  // by the passes of that barrier, modulo 3
};

Block* block = nullptr;
Thread* running = nullptr;

void leave() {
  context::fiber& scheduler = *running->scheduler;
  scheduler = std::move(scheduler).resume();
}

void wait_at(Barrier& barrier) {
  running->at = &barrier;
  running->passed = barrier.passed;
  ++barrier.arrived;
  barrier.pass_if_complete();
  if (running->waits()) leave();
  running->at = nullptr;
}

// A thread that has ended is not waited for any more.
void end_of_thread() {
  running->ended = true;
  for (Barrier* const barrier : {&block->all, &block->warps[static_cast<size_t>(running->warp)]}) {
    --barrier->expected;
    barrier->pass_if_complete();
  }
}

void resume(Thread& thread) {
  running = &thread;
  position = &thread.position;
  thread.fiber = std::move(thread.fiber).resume();
  running = nullptr;
  position = nullptr;
}

void run_block(Block& b, const std::function<void()>& kernel,
               context::pooled_fixedsize_stack& stacks) {
  block = &b;
  size_t left = b.threads.size();
  for (Thread& thread : b.threads) {
    thread.fiber = context::fiber(std::allocator_arg, stacks, [&](context::fiber&& from) {
      thread.scheduler = &from;
      kernel();
      end_of_thread();
      --left;
      return std::move(from);
    });
  }
  // Whose turn it is first, and in which direction they follow, changes: what depends on it is a
  // race.
  const size_t count = b.threads.size();
  std::minstd_rand random;
  while (left > 0) {
    bool any = false;
    const size_t first = random() % count, step = random() % 2 == 0 ? 1 : count - 1;
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = b.threads[(first + i * step) % count];
      if (thread.ended || thread.waits()) continue;
      any = true;
      resume(thread);
    }
    if (!any) throw std::logic_error("threads of a block wait for each other");
  }
  block = nullptr;
}

}  // namespace

void run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
  static std::mutex mutex;  // shared memory is there once
  const std::scoped_lock lock(mutex);
  const unsigned count = threads.x * threads.y * threads.z;
  if (count > 1024) throw std::logic_error("a block of more than 1024 threads");
  if (shared_bytes > kSharedBytes) throw std::logic_error("more shared memory than there is");
  static context::pooled_fixedsize_stack stacks(kStackBytes);
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        Block b;
        b.threads = std::vector<Thread>(count);
        b.warps.resize((count + kWarp - 1) / kWarp);
        for (unsigned i = 0; i < count; ++i) {
          Thread& thread = b.threads[i];
          thread.position = {
              .thread = {i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y},
              .block = {x, y, z},
              .threads = threads,
              .blocks = blocks};
          thread.warp = static_cast<int>(i) / kWarp;
          thread.lane = static_cast<int>(i) % kWarp;
          ++b.warps[static_cast<size_t>(thread.warp)].expected;
        }
        b.all.expected = static_cast<int>(count);
        std::fill_n(dynamic_shared, shared_bytes, static_cast<char>(0xff));
        run_block(b, kernel, stacks);
      }
    }
  }
}

void wait_for_block() {
  wait_at(block->all);
}

void wait_for_warp() {
  wait_at(block->warps[static_cast<size_t>(running->warp)]);
}

int count_in_block(bool yes) {
  Block& b = *block;
  const unsigned pass = b.all.passed;
  b.yes[pass % 3] += yes ? 1 : 0;
  b.yes[(pass + 1) % 3] = 0;
  wait_for_block();
  return b.yes[pass % 3];
}

void post_bytes(const void* bytes, size_t count) {
  std::memcpy(running->posts[++running->posted % 2].data(), bytes, count);
  wait_for_warp();
}

const void* posted(int lane) {
  const size_t i = static_cast<size_t>(running->warp) * kWarp + static_cast<size_t>(lane);
  if (i >= block->threads.size()) return nullptr;
  const Thread& other = block->threads[i];
  if (other.posted < running->posted) return nullptr;  // it ended before
  return other.posts[running->posted % 2].data();
}

int lane() {
  return running->lane;
}

}  // namespace mamba3::emulation
