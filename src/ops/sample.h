#pragma once

#include "core/context.h"

namespace mamba3 {

struct SampleArgs {
  View logits = {};   // (B, V) f32; rows may be strided. Not changed.
  int64_t vocab = 0;  // ids below this may be drawn; the rest is padding
  View history = {};  // (B, L) i32, tokens that the repeat penalty is for, -1: none; or empty
  View out = {};      // (B) i32
  // Filters, in this order: repeat penalty, then top-k, then top-p and min-p on the distribution at
  // temperature 1, then the temperature. temperature 0 takes the largest logit (lowest id on a
  // tie). Logits that are NaN or +infinity, or all -infinity, are an Error that names the row; the
  // GPU, which cannot throw, gives the row the id -1, and who fetches the ids has to look for it.
  float temperature = 1.0f;
  int32_t top_k = 0;            // 0: off
  float top_p = 1.0f;           // 1: off
  float min_p = 0.0f;           // 0: off; keeps p >= min_p * largest p
  float repeat_penalty = 1.0f;  // 1: off; divides positive and multiplies negative logits
  // The draw of row b is a pure function of (seed, position, b): the same on every device.
  uint64_t seed = 0;
  uint64_t position = 0;
  // Both on the context's device, or empty; so that a recorded sequence of ops can be repeated with
  // draws of its own, and a sequence keeps its draws wherever in a batch it is.
  View step = {};  // (1) or (B) i64, added to position
  View rows = {};  // (B) i32, in the place of b, first_row added
  uint32_t first_row = 0;
};

void sample(Context& ctx, const SampleArgs& args);

namespace cpu {
void sample(Context& ctx, const SampleArgs& args);
}  // namespace cpu
namespace cuda {
void sample(Context& ctx, const SampleArgs& args);
}  // namespace cuda

}  // namespace mamba3
