#include "ops/increment.h"

namespace mamba3::cpu {

namespace {

template <typename T>
void add(const View& counters, int64_t by) {
  T* const c = counters.as<T>();
  for (int64_t i = 0; i < counters.size(); ++i) c[i] += static_cast<T>(by);
}

}  // namespace

void increment(Context&, const IncrementArgs& args) {
  if (args.counters.dtype == DType::i64) return add<int64_t>(args.counters, args.by);
  add<int32_t>(args.counters, args.by);
}

}  // namespace mamba3::cpu
