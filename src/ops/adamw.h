#pragma once

#include <span>

#include "core/context.h"

namespace mamba3 {

// One parameter tensor and what the optimiser keeps beside it, all dense f32 of equal size; and, if
// the model computes with it, the parameter rounded to bf16, which is written with every update.
struct AdamwTensor {
  View param, grad, m, v;
  bool decay = true;  // weight decay applies (not to norms, biases, dt_bias, D)
  View low = {};      // bf16, or empty
};

// AdamW (Loshchilov & Hutter 2019) with clipping by the global norm:
//   g *= min(1, clip / |g|);  m = beta1 m + (1-beta1) g;  v = beta2 v + (1-beta2) g^2
//   param -= lr * (m / (1-beta1^step) / (sqrt(v / (1-beta2^step)) + eps) + weight_decay * param)
//
// A recorded update (core/graph.h) is replayed with other numbers and another loss, so it finds
// them in memory: `numbers` and `loss`.
struct AdamwArgs {
  std::span<const AdamwTensor> tensors;
  float lr = 0, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
  float clip = 1.0f;  // global norm; 0: no clipping
  int64_t step = 1;   // 1 for the first update
  View numbers = {};  // (4) f32, an AdamwNumbers, or empty: those of this struct
  View loss = {};     // (1) f64, or empty: if it is not finite, nothing is updated
  View grad_norm;     // (1) f32: the global norm before clipping. If it is not finite, nothing is
                      // updated.
};

// The numbers of an update that are new with every step.
struct AdamwNumbers {
  float lr, decay;         // decay: lr * weight_decay
  float unbias1, unbias2;  // 1 / (1 - beta^step)
};

// Of lr, step, weight_decay and the betas. Throws InputError if they are not what adamw() takes.
AdamwNumbers adamw_numbers(const AdamwArgs& args);

void adamw(Context& ctx, const AdamwArgs& args);

namespace cpu {
void adamw(Context& ctx, const AdamwArgs& args);
}  // namespace cpu
namespace cuda {
void adamw(Context& ctx, const AdamwArgs& args);
}  // namespace cuda

}  // namespace mamba3
