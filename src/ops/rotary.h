#pragma once

#include "core/context.h"

namespace mamba3 {

// Rotary position embedding (Su et al., "RoFormer", 2021) of the queries and keys of attention, in
// place: of every head, channels i and i + dims/2 turn by position * base^(-2i/dims), i < dims/2,
//   (a, b) -> (a cos - b sin, a sin + b cos),
// and the channels from dims on stay. The angle is formed in double, so that its cosine is right to
// the rounding of f32 at positions up to ten million.
struct RotaryArgs {
  // (B, T, heads d) f32, on the GPU also bf16; time and batch may be strided. Heads that lie side
  // by side may be taken together: the q and k columns of a projection [q, k, v].
  View x;
  int64_t d = 0;     // head dim
  int64_t dims = 0;  // even, from 2 to d
  double base = 10000;
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
                         // of x, whose tokens count from its own start
  // (sequences) i32, not negative: the position of the first token of each sequence, such as the
  // lengths of an AttentionCache; empty: 0.
  View start = {};
  bool inverse = false;  // turn back. That is also the backward, applied to a gradient.
};

void rotary(Context& ctx, const RotaryArgs& args);

namespace cpu {
void rotary(Context& ctx, const RotaryArgs& args);
}  // namespace cpu
namespace cuda {
void rotary(Context& ctx, const RotaryArgs& args);
}  // namespace cuda

}  // namespace mamba3
