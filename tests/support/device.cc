#include "support/device.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace mamba3::testing {

Device test_device() {
  static const Device device = [] {
    const char* name = std::getenv("MAMBA3_TEST_DEVICE");
    return name != nullptr && std::string_view(name) == "cuda" ? Device::cuda : Device::cpu;
  }();
  return device;
}

std::vector<DType> test_dtypes() {
  if (test_device() == Device::cpu) return {DType::f32};
  return {DType::f32, DType::bf16};
}

Context make_context(int threads) {
  if (test_device() == Device::cpu) return Context(threads);
  static const std::shared_ptr<cuda::Stream> stream = cuda::make_stream();
  return Context(threads, Device::cuda, stream);
}

HostCopy host_copy(const View& view) {
  if (view.device == Device::cpu) return {view, nullptr};
  int64_t elements = 1;
  for (int axis = 0; axis < view.rank; ++axis) {
    elements += std::max<int64_t>(view.dim(axis) - 1, 0) * view.stride(axis);
  }
  const int64_t bytes = elements * size_of(view.dtype);
  HostCopy out{view, allocate_bytes(Device::cpu, static_cast<size_t>(bytes))};
  Context ctx = make_context(1);
  copy(ctx, make_view(view.data, DType::u8, {bytes}, Device::cuda),
       make_view(out.bytes.get(), DType::u8, {bytes}));
  out.view.data = out.bytes.get();
  out.view.device = Device::cpu;
  return out;
}

}  // namespace mamba3::testing
