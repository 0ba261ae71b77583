#include "ops/increment.h"

namespace mamba3::cpu {

void increment(Context&, const IncrementArgs& args) {
  int32_t* counters = args.counters.as<int32_t>();
  for (int64_t i = 0; i < args.counters.size(); ++i) counters[i] += static_cast<int32_t>(args.by);
}

}  // namespace mamba3::cpu
