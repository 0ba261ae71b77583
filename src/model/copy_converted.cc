#include "model/copy_converted.h"

#include <vector>

#include "core/memory.h"

namespace mamba3 {

void copy_converted(Context& ctx, const View& from, const View& to) {
  if (from.dtype == to.dtype) return copy(ctx, from, to);
  std::vector<float> floats;
  const float* values = static_cast<const float*>(from.data);
  if (from.dtype != DType::f32) {
    floats.resize(static_cast<size_t>(from.size()));
    to_float(from.data, from.dtype, floats.data(), from.size());
    values = floats.data();
  }
  std::vector<std::byte> converted(static_cast<size_t>(to.bytes()));
  from_float(values, converted.data(), to.dtype, to.size());
  View host = to;
  host.data = converted.data();
  host.device = Device::cpu;
  copy(ctx, host, to);
}

}  // namespace mamba3
