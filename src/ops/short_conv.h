#pragma once

#include "core/context.h"

namespace mamba3 {

// Widths that the kernels are made for.
inline constexpr int64_t kNarrowestConv = 2, kWidestConv = 8;

// What a sequence carries from call to call: the inputs of its last W-1 tokens, oldest first. Zero
// is the start of a sequence.
struct ShortConvState {
  View inputs;  // (rows, W-1, C) f32 dense, a pool of rows
  View rows;    // (sequences) i32: the pool row of each sequence, all different

  bool empty() const { return inputs.empty(); }
};

// The causal convolution of width W over time, each channel by itself, and SiLU: what Mamba-2
// (Dao and Gu, 2024) and gated delta nets have between in_proj and their recurrence,
//   out[t, c] = silu(bias[c] + sum_j weight[c, j] in[t-W+1+j, c]),
// where inputs before the start of a sequence are those of the state, or 0. The channels are some
// columns of a projection; its other columns are copied. Any T from 0 up, also shorter than W-1,
// and T = 1 for a step of decoding; sequences of length 0 keep their state.
struct ShortConvArgs {
  int64_t first = 0;  // the channels are columns [first, first + C) of in and out
  View in;            // (B, T, X) f32, on the GPU also bf16; time and batch may be strided
  View weight;        // (C, W) f32 dense, W from 2 to 8; weight[c, W-1] multiplies the token itself
  View bias = {};     // (C) f32 dense, or empty
  View out;           // (B, T, X) in the dtype of in
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
  ShortConvState state = {};  // read and overwritten; empty: start from zero
};

// Of sequences that start from zero. Recomputes the sum under the SiLU; nothing is kept by the
// forward.
struct ShortConvBackwardArgs {
  int64_t first = 0;
  View in;           // (B, T, X) as in the forward
  View weight;       // (C, W) f32 dense
  View bias = {};    // (C) f32 dense, or empty
  View d_out;        // (B, T, X) in the dtype of in
  View d_in;         // (B, T, X) in the dtype of in, overwritten, all columns
  View d_weight;     // (C, W) f32 dense, accumulated into
  View d_bias = {};  // (C) f32 dense, accumulated into; empty if there is no bias
  View cu_seqlens = {};
};

void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);

namespace cpu {
void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void short_conv(Context& ctx, const ShortConvArgs& args);
void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
