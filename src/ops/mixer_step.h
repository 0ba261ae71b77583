#pragma once

#include "ops/mixer.h"

namespace mamba3 {

// mixer_scan for one token a sequence, the state updated in place: one pass over the state.
struct MixerStepArgs {
  MixerShape shape;
  MixerParams params;
  View proj;         // (B, d_proj) f32; on the GPU also bf16
  View y;            // (B, H P) in the dtype of proj
  MixerState state;  // rows (B)
};

void mixer_step(Context& ctx, const MixerStepArgs& args);

namespace cpu {
void mixer_step(Context& ctx, const MixerStepArgs& args);
}  // namespace cpu
namespace cuda {
void mixer_step(Context& ctx, const MixerStepArgs& args);
}  // namespace cuda

}  // namespace mamba3
