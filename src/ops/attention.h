#pragma once

#include "core/context.h"

namespace mamba3 {

// Heads wider than this have kernels on the CPU only.
inline constexpr int64_t kWidestGpuHead = 256;

// Keys and values of the tokens so far, a row of the pool per sequence.
struct AttentionCache {
  View k;        // (rows, T_max, Hkv, d) f32; on the GPU also bf16, whatever qkv is
  View v;        // (rows, T_max, Hkv, d) in the dtype of k
  View rows;     // (B) i32, the pool row of each sequence
  View lengths;  // (B) i32, tokens that the row holds before this call; the caller advances it
};

// Causal softmax attention with grouped queries and no positions. Query head h reads key/value head
// h / (Hq / Hkv); scores are scaled by 1/sqrt(d). With a bf16 cache the new keys and values are
// rounded before they are used, in a call of many tokens as in one of a single token.
struct AttentionArgs {
  int64_t Hq = 0, Hkv = 0, d = 0;
  View qkv;              // (B, T, (Hq + 2 Hkv) d) f32, on the GPU also bf16: [q, k, v]
  View y;                // (B, T, Hq d) in the dtype of qkv
  View lse = {};         // (B, Hq, T) f32, or empty: kept for the backward
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
  // Present: this call continues the sequences. Queries also see the cached tokens, and the new k,
  // v are appended at lengths[b]; lengths[b] + T <= T_max. Not together with cu_seqlens.
  AttentionCache cache = {};
};

struct AttentionBackwardArgs {
  int64_t Hq = 0, Hkv = 0, d = 0;
  View qkv;  // as in the forward; no cache
  View y;    // (B, T, Hq d) in the dtype of qkv
  View lse;  // (B, Hq, T) f32
  View cu_seqlens = {};
  View d_y;    // (B, T, Hq d) in the dtype of qkv
  View d_qkv;  // (B, T, (Hq + 2 Hkv) d) in the dtype of qkv, overwritten
};

void attention(Context& ctx, const AttentionArgs& args);
void attention_backward(Context& ctx, const AttentionBackwardArgs& args);
// One token a sequence: attention() with T = 1 and a cache, laid out for latency.
void attention_step(Context& ctx, const AttentionArgs& args);

namespace cpu {
void attention(Context& ctx, const AttentionArgs& args);
void attention_backward(Context& ctx, const AttentionBackwardArgs& args);
void attention_step(Context& ctx, const AttentionArgs& args);
}  // namespace cpu
namespace cuda {
void attention(Context& ctx, const AttentionArgs& args);
void attention_backward(Context& ctx, const AttentionBackwardArgs& args);
void attention_step(Context& ctx, const AttentionArgs& args);
}  // namespace cuda

}  // namespace mamba3
