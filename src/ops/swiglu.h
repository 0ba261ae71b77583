#pragma once

#include "core/context.h"

namespace mamba3 {

// out = y * silu(gate), where fc1's output holds [y, gate] side by side.
struct SwigluArgs {
  View y_gate;  // (M, 2F) f32
  View out;     // (M, F) f32
};

struct SwigluBackwardArgs {
  View y_gate;    // (M, 2F) f32
  View d_out;     // (M, F) f32
  View d_y_gate;  // (M, 2F) f32, overwritten; may be y_gate itself
};

void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);

namespace cpu {
void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void swiglu(Context& ctx, const SwigluArgs& args);
void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
