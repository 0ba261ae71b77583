#pragma once

#include "core/context.h"

namespace mamba3 {

// out = y * silu(gate), where fc1's output holds [y, gate] side by side. All are f32 or, on the
// GPU, all bf16.
struct SwigluArgs {
  View y_gate;  // (M, 2F)
  View out;     // (M, F)
};

struct SwigluBackwardArgs {
  View y_gate;    // (M, 2F)
  View d_out;     // (M, F)
  View d_y_gate;  // (M, 2F), overwritten; may be y_gate itself
};

void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);

// What swiglu() throws, for an op that is this and more.
void check_swiglu(const Context& ctx, const SwigluArgs& args);

namespace cpu {
void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
