#pragma once

#include "core/context.h"

namespace mamba3 {

// The norm of a mixer's gated output before its out_proj, by groups of channels: the group norm of
// Mamba-2 (Dao and Gu 2024), there after the gate (norm_before_gate = False), which is in x
// already:
//   out[m, i] = x[m, i] * rstd * weight[i],   rstd = 1 / sqrt(mean(x^2) + eps) over i's group,
// groups being `groups` equal runs of channels. x and out are f32 or, on the GPU, both bf16; sums
// are f32, so that elements of x may be as large as 1e17. Throws InputError if groups is below 1 or
// does not divide C.
struct GroupedRmsNormArgs {
  int64_t groups = 1;
  View x;       // (M, C)
  View weight;  // (C) f32
  View out;     // (M, C); may be x itself
  float eps = 1e-5f;
};

// Recomputes rstd. All activations are of one type, as above.
struct GroupedRmsNormBackwardArgs {
  int64_t groups = 1;
  View x;       // (M, C), as given to the forward
  View weight;  // (C) f32
  float eps = 1e-5f;
  View d_out;     // (M, C)
  View d_x;       // (M, C), overwritten; may be d_out itself
  View d_weight;  // (C) f32, accumulated into
};

void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args);
void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args);

namespace cpu {
void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args);
void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args);
void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
