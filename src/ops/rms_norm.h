#pragma once

#include "core/context.h"

namespace mamba3 {

// residual += delta (if delta is present); out = residual * rstd * weight with
// rstd = 1 / sqrt(mean(residual^2) + eps). The residual stream is f32 whatever the weights are;
// delta, out, d_out and d_residual_copy are f32 or, on the GPU, each also bf16. With views
// aligned alike, the bits of out and rstd depend on the sum, not on whether it was formed here.
struct RmsNormArgs {
  View residual;           // (M, D) f32, read
  View delta = {};         // (M, D), or empty
  View weight;             // (D) f32
  View residual_out = {};  // (M, D) f32, residual + delta; may be the residual itself. Empty with
                           // no delta.
  View out;                // (M, D)
  View rstd = {};          // (M) f32, or empty: kept for the backward
  float eps = 1e-5f;
};

// The gradient of the sum that the norm read: d_residual = d_residual_in + (backward of the norm).
// With a fused add the same gradient also belongs to delta.
struct RmsNormBackwardArgs {
  View residual;    // (M, D) f32, residual + delta of the forward
  View weight;      // (D) f32
  View rstd;        // (M) f32
  View d_out;       // (M, D)
  View d_residual;  // (M, D) f32: in, the gradient that arrives along the residual stream; out, the
                    // total
  View d_residual_copy = {};  // (M, D), or empty: the total once more, rounded to another type for
                              // the matrix products that read it
  View d_weight;              // (D) f32, accumulated into
};

void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);

namespace cpu {
void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void rms_norm(Context& ctx, const RmsNormArgs& args);
void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
