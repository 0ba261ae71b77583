#pragma once

#include "core/context.h"

namespace mamba3 {

// y_gate = x weight^T, out = y silu(gate), where y_gate holds [y, gate] side by side: linear() and
// swiglu(), whose dtypes these are. On the GPU a few rows are one kernel, unless y_gate is kept.
struct LinearSwigluArgs {
  View x;             // (M, K), rows may be strided
  View weight;        // (2F, K), dense
  View y_gate;        // (M, 2F)
  View out;           // (M, F)
  bool keeps = true;  // y_gate, for a backward; else it is scratch
};

void linear_swiglu(Context& ctx, const LinearSwigluArgs& args);

namespace cuda {
// Returns false, and does nothing, where there is no such kernel. y_gate is left alone.
bool linear_swiglu(Context& ctx, const LinearSwigluArgs& args);
}  // namespace cuda

}  // namespace mamba3
