#pragma once

#include <cstddef>
#include <memory>

#include "core/context.h"

namespace mamba3 {

namespace cuda {
struct Mailbox;  // src/cuda/fetch.cc
}  // namespace cuda

// Brings a result of the GPU to the host without waiting for the ops that come after it.
class Fetch {
 public:
  // Room for `bytes` at a time.
  Fetch(Device device, size_t bytes);

  // Asks for a contiguous view on the context's device, as it is after the ops so far.
  void start(Context& ctx, const View& from);
  // Waits for what was asked for last, and returns it. Valid until the next start().
  const void* wait();

 private:
  std::shared_ptr<cuda::Mailbox> mailbox_;  // null on the CPU
  std::shared_ptr<void> memory_;            // of the CPU
  size_t bytes_;
};

namespace cuda {
std::shared_ptr<Mailbox> make_mailbox(size_t bytes);
void send(Context& ctx, Mailbox& mailbox, const void* from, size_t bytes);
const void* receive(Mailbox& mailbox);
}  // namespace cuda

}  // namespace mamba3
