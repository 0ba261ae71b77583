#pragma once

#include "core/scratch.h"
#include "core/threads.h"
#include "core/view.h"

namespace mamba3 {

// Where and with what an op runs. Belongs to one session or trainer and is used by one thread at a
// time.
struct Context {
  explicit Context(int thread_count = 0) : threads(thread_count) {}

  Device device = Device::cpu;
  ThreadPool threads;
  Scratch scratch;
};

}  // namespace mamba3
