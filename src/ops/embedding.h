#pragma once

#include "core/context.h"

namespace mamba3 {

// out[i, :] = weight[ids[i], :], as f32. An id outside of [0, V) throws; on the GPU, where reading
// the ids would wait for it, it gives a row of NaN, and takes no part in the backward.
struct EmbeddingArgs {
  View ids;     // (M) i32
  View weight;  // (V, D) f32, bf16 or f16
  View out;     // (M, D) f32
};

// d_weight[ids[i], :] += d_out[i, :]. Rows that occur several times are summed in the order of i,
// so the result does not depend on the number of threads.
struct EmbeddingBackwardArgs {
  View ids;       // (M) i32
  View d_out;     // (M, D) f32
  View d_weight;  // (V, D) f32, accumulated into
};

void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);

namespace cpu {
void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void embedding(Context& ctx, const EmbeddingArgs& args);
void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
