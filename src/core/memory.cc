#include "core/memory.h"

#include <cstdlib>
#include <cstring>

#include "core/error.h"

namespace mamba3 {

namespace {

constexpr size_t kAlignment = 256;  // what CUDA's allocator gives; a multiple of a cache line

void check_contiguous(const char* what, const View& view) {
  if (!view.contiguous()) error("[copy] {} {} must be contiguous", what, view.shape());
}

}  // namespace

std::shared_ptr<void> allocate_bytes(Device device, size_t bytes) {
  if (device == Device::cuda) return cuda::allocate_bytes(bytes);
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded > 0 ? rounded : kAlignment);
  if (memory == nullptr) error("out of memory: {} bytes", bytes);
  return {memory, std::free};
}

std::shared_ptr<void> allocate_zeros(Device device, size_t bytes) {
  std::shared_ptr<void> memory = allocate_bytes(device, bytes);
  if (device == Device::cuda) {
    cuda::zero_new_bytes(memory.get(), bytes);
  } else {
    std::memset(memory.get(), 0, bytes);
  }
  return memory;
}

void copy(Context& ctx, const View& from, const View& to) {
  if (from.dtype != to.dtype || from.size() != to.size()) {
    error("[copy] cannot copy {} {} to {} {}", name_of(from.dtype), from.shape(), name_of(to.dtype),
          to.shape());
  }
  if (from.size() == 0) return;
  check_contiguous("the source", from);
  check_contiguous("the target", to);
  const auto bytes = static_cast<size_t>(from.bytes());
  if (from.device == Device::cpu && to.device == Device::cpu) {
    std::memcpy(to.data, from.data, bytes);
  } else {
    cuda::copy_bytes(ctx, from.data, to.data, bytes, from.device != to.device);
  }
}

void zero(Context& ctx, const View& view) {
  if (view.size() == 0) return;
  check_contiguous("the view to clear", view);
  const auto bytes = static_cast<size_t>(view.bytes());
  if (view.device == Device::cpu) {
    std::memset(view.data, 0, bytes);
  } else {
    cuda::zero_bytes(ctx, view.data, bytes);
  }
}

void synchronize(Context& ctx) {
  if (ctx.device == Device::cuda) cuda::synchronize(ctx);
}

}  // namespace mamba3
