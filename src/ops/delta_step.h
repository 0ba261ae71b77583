#pragma once

#include "ops/delta.h"

namespace mamba3 {

// delta_scan for one token a sequence, the state updated in place.
struct DeltaStepArgs {
  DeltaShape shape;
  DeltaParams params;
  View proj;         // (B, d_proj) f32; on the GPU also bf16
  View y;            // (B, H V) in the dtype of proj
  DeltaState state;  // rows (B)
};

void delta_step(Context& ctx, const DeltaStepArgs& args);

namespace cpu {
void delta_step(Context& ctx, const DeltaStepArgs& args);
}  // namespace cpu
namespace cuda {
void delta_step(Context& ctx, const DeltaStepArgs& args);
}  // namespace cuda

}  // namespace mamba3
