#pragma once

#include "core/context.h"

namespace mamba3 {

// The language-model head and its loss, in slices of tokens, so that all logits never exist at
// once:
//   logits = hidden weight^T,  lse = log(sum_{v < vocab} exp(logits_v)),  nll = lse -
//   logits[target].
// The loss is the root of the graph, so its gradient needs no second pass: with d_hidden and
// d_weight present, the gradient of scale * sum(nll) is formed while a slice of logits is at hand.
// On the CPU activations are f32; on the GPU hidden and weight are both f32 or both bf16, and
// d_hidden is either. Logits and their sums are f32, the gradient of the logits has the dtype of
// hidden.
struct CrossEntropyArgs {
  View hidden;         // (M, D)
  View weight;         // (V, D) f32, bf16 or, on the CPU, f16
  View targets;        // (M) i32; -1: the token is not scored (nll 0, no gradient).
                       // Others outside of [0, vocab) throw; on the GPU their nll is NaN
  int64_t vocab = 0;   // columns that take part; rows from here to V are padding
  View nll;            // (M) f32, natural log
  View lse = {};       // (M) f32, or empty
  View d_hidden = {};  // (M, D), overwritten, or empty
  View d_weight = {};  // (V, D) f32, accumulated into, or empty
  View scale = {};     // (1) f32, or empty: 1
  // On the GPU: scratch for a slice with gradients. Every slice reads and writes all of d_weight,
  // and the product for d_hidden fills the GPU with thousands of tokens only. By default 16384
  // tokens of a vocabulary of 128256 are two slices of 8192 in bf16, in 2.2 GB.
  int64_t slice_bytes = int64_t{9} << 28;
};

void cross_entropy(Context& ctx, const CrossEntropyArgs& args);

// The tokens of a slice of M, given the bytes that one needs and those that there are: slices of
// nearly the same size, multiples of kCrossEntropyStep unless there is one only.
inline constexpr int64_t kCrossEntropyStep = 256;  // what two blocks of the products have
int64_t cross_entropy_slice(int64_t M, int64_t bytes_of_token, int64_t slice_bytes);

namespace cpu {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
}  // namespace cpu
namespace cuda {
void cross_entropy(Context& ctx, const CrossEntropyArgs& args);
}  // namespace cuda

}  // namespace mamba3
