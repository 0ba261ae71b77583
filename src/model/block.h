#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/context.h"
#include "model/config.h"
#include "model/state.h"
#include "model/tensors.h"

namespace mamba3 {

// One layer: residual += mixer(rmsnorm(residual)); residual += swiglu(rmsnorm(residual)). The mixer
// is what Config::kind() says.

// A layer's parameters, or their gradients. Matrices as stored (f32, bf16, f16), the rest f32;
// gradients all f32.
struct BlockWeights {
  View norm;             // (D)
  View in_proj;          // (d_proj, D); attention: ((Hq + 2 Hkv) d, D)
  View in_proj_bias;     // attention with qkv_bias, else empty
  View conv, conv_bias;  // (channels, W), (channels); empty without a convolution or its bias
  MixerParams mixer;     // of a mamba3 or mamba2 layer
  DeltaParams delta;     // of a gated_deltanet layer
  View gated_norm;       // (H P), mamba2: the norm after the gate
  View out_proj;         // (D, H P); attention: (D, Hq d)
  View out_proj_bias;    // attention with out_bias, else empty
  View norm2;            // (D); this and the next two are empty without an MLP
  View fc1;              // (2F, D): [y, gate]
  View fc2;              // (D, F)
};

BlockWeights resolve_block_weights(const Config& config, const NamedTensors& tensors,
                                   int64_t layer);

// What a forward writes for M tokens: the stream, rstd and lse f32, the others f32 or, on the GPU,
// bf16. For training every layer has its own, or the layers share one set and the backward does
// each forward again (Keep::streams); in inference they share one set, residual and residual2 are
// the stream itself, normed and normed2 are the same memory, and rstd, rstd2 and lse are empty: not
// kept.
struct BlockActivations {
  View residual;   // (M, D), the stream that norm reads
  View rstd;       // (M)
  View normed;     // (M, D)
  View proj;       // (M, d_proj or (Hq + 2 Hkv) d), rows may be strided
  View conv;       // as proj, after the convolution; empty without one
  View gated;      // (M, H P), what the norm after the gate reads; empty without one
  View y;          // (M, H P or Hq d)
  View lse;        // (M Hq), attention only
  View residual2;  // (M, D), the stream that norm2 reads
  View rstd2;      // (M)
  View normed2;    // (M, D)
  View fc1;        // (M, 2F)
  View act;        // (M, F)
  // Scratch, shared by all layers: the backward has no use for it.
  View delta;  // (M, D), what a branch adds to the stream
  // Scratch of the backward, likewise shared; empty in inference.
  View d_normed;  // (M, D)
  View d_proj;    // as proj
  View d_conv;    // as conv
  View d_y;       // as y
  View d_act;     // (M, F)
};

// The residual stream between two norms: its value is residual + delta. The sum is left to the next
// norm, which reads both anyway.
struct Stream {
  View residual;    // (M, D)
  View delta = {};  // (M, D), or empty
};

struct BlockForwardArgs {
  const Config& config;
  const BlockWeights& weights;
  const BlockActivations& activations;
  int64_t layer = 0;
  int64_t B = 1, T = 0;  // M = B T
  View cu_seqlens = {};  // (n+1) i32, or empty: as in mixer_scan
  // The same in host memory, which an attention layer with a state needs: attention() takes no
  // packed sequences together with caches, so there they are taken one by one.
  std::span<const int32_t> host_cu_seqlens = {};
  // Present: carry on from here, and leave the state after the last token. T = 1 then takes a step
  // instead of a scan.
  const BlockState* state = nullptr;
};

// Returns the stream after the layer; it lives in `activations`. A stream without a delta, the
// input of the first layer, must be in activations.residual already.
Stream block_forward(Context& ctx, const BlockForwardArgs& args, const Stream& in);

// The gradient of the residual stream.
struct StreamGradient {
  View total;      // (M, D) f32
  View copy = {};  // (M, D), total in the type of the activations; empty if that is f32

  // What matrix products take.
  const View& operand() const { return copy.empty() ? total : copy; }
};

struct BlockBackwardArgs {
  const Config& config;
  const BlockWeights& weights;
  const BlockActivations& activations;  // of the forward, all kept; fc1 is overwritten
  const BlockWeights& gradients;        // f32, accumulated into
  int64_t layer = 0;
  int64_t B = 1, T = 0;
  View cu_seqlens = {};
};

// d_stream: in, the gradient of the stream after the layer; out, before it. States are not
// continued in training.
void block_backward(Context& ctx, const BlockBackwardArgs& args, const StreamGradient& d_stream);

}  // namespace mamba3
