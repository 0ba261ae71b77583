#include "core/fetch.h"

#include <cstring>

#include "core/error.h"
#include "core/memory.h"

namespace mamba3 {

Fetch::Fetch(Device device, size_t bytes) : bytes_(bytes) {
  if (device == Device::cpu) {
    memory_ = allocate_bytes(device, bytes);
  } else {
    mailbox_ = cuda::make_mailbox(bytes);
  }
}

void Fetch::start(Context& ctx, const View& from) {
  const auto bytes = static_cast<size_t>(from.bytes());
  if (!from.contiguous() || bytes > bytes_) {
    error("[fetch] {} {} must be contiguous and at most {} bytes", name_of(from.dtype),
          from.shape(), bytes_);
  }
  if (mailbox_ != nullptr) return cuda::send(ctx, *mailbox_, from.data, bytes);
  std::memcpy(memory_.get(), from.data, bytes);
}

const void* Fetch::wait() {
  return mailbox_ != nullptr ? cuda::receive(*mailbox_) : memory_.get();
}

}  // namespace mamba3
