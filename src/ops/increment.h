#pragma once

#include "core/context.h"

namespace mamba3 {

// counters += by: lengths and positions that a captured graph of ops advances by itself.
struct IncrementArgs {
  View counters;  // (n) i32 or i64
  int64_t by = 1;
};

void increment(Context& ctx, const IncrementArgs& args);

namespace cpu {
void increment(Context& ctx, const IncrementArgs& args);
}  // namespace cpu
namespace cuda {
void increment(Context& ctx, const IncrementArgs& args);
}  // namespace cuda

}  // namespace mamba3
