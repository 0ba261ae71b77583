#include "core/fetch.h"

#include "cuda/runtime.h"

namespace mamba3::cuda {

struct Mailbox {
  void* memory = nullptr;  // of the host, where the GPU writes by itself
  cudaEvent_t arrived = nullptr;

  Mailbox() = default;
  ~Mailbox() {
    if (arrived != nullptr) {
      cudaEventSynchronize(arrived);  // nothing may arrive any more
      cudaEventDestroy(arrived);
    }
    if (memory != nullptr) cudaFreeHost(memory);
  }
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;
};

std::shared_ptr<Mailbox> make_mailbox(size_t bytes) {
  auto mailbox = std::make_shared<Mailbox>();
  check(cudaMallocHost(&mailbox->memory, bytes), "allocating pinned memory");
  check(cudaEventCreateWithFlags(&mailbox->arrived, cudaEventDisableTiming), "making an event");
  return mailbox;
}

void send(Context& ctx, Mailbox& mailbox, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(mailbox.memory, from, bytes, cudaMemcpyDeviceToHost, stream_of(ctx)),
        "copying");
  check(cudaEventRecord(mailbox.arrived, stream_of(ctx)), "recording an event");
}

const void* receive(Mailbox& mailbox) {
  check(cudaEventSynchronize(mailbox.arrived), "waiting for the GPU");
  return mailbox.memory;
}

}  // namespace mamba3::cuda
