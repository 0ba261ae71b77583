#pragma once

#include <memory>

#include "core/scratch.h"
#include "core/threads.h"
#include "core/view.h"

namespace mamba3 {

namespace cuda {
struct Stream;  // src/cuda/runtime.h
std::shared_ptr<Stream> make_stream();
}  // namespace cuda

// Where and with what an op runs. Belongs to one session or trainer and is used by one thread at a
// time. On the GPU the ops of a context run in order and asynchronously; see core/memory.h for how
// to wait for them.
struct Context {
  // 0 threads: as many as the process may use. Throws InputError when the device is not there.
  explicit Context(int thread_count = 0, Device where = Device::cpu)
      : Context(thread_count, where, where == Device::cuda ? cuda::make_stream() : nullptr) {}
  // On the stream of another context.
  Context(int thread_count, Device where, std::shared_ptr<cuda::Stream> shared)
      : device(where), stream(std::move(shared)), threads(thread_count), scratch(where) {}

  Device device;
  std::shared_ptr<cuda::Stream> stream;  // of the GPU; null on the CPU
  ThreadPool threads;
  Scratch scratch;
};

}  // namespace mamba3
