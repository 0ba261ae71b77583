#pragma once

#include "core/context.h"

namespace mamba3 {

// y = x weight^T + bias, or y += ... with `accumulate`. The sums are f32. On the CPU activations
// are f32, and weights may be stored in 16 bits. On the GPU x and weight are both f32 or both bf16,
// and y, d_y and d_x are f32 or bf16 each.
struct LinearArgs {
  View x;          // (M, K), rows may be strided
  View weight;     // (N, K) f32, bf16 or, on the CPU, f16; dense
  View bias = {};  // (N) f32, or empty
  View y;          // (M, N), rows may be strided
  bool accumulate = false;
};

struct LinearBackwardArgs {
  View x;            // (M, K), or empty when d_weight is
  View weight;       // (N, K) f32, bf16 or, on the CPU, f16; or empty when d_x is
  View d_y;          // (M, N), rows may be strided
  View d_x;          // (M, K), or empty; overwritten, or added to with accumulate_d_x
  View d_weight;     // (N, K) f32, or empty; accumulated into
  View d_bias = {};  // (N) f32, or empty; accumulated into
  bool accumulate_d_x = false;
};

void linear(Context& ctx, const LinearArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);

// What linear() throws, for an op that is a product and more.
void check_linear(const Context& ctx, const LinearArgs& args);

namespace cpu {
void linear(Context& ctx, const LinearArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void linear(Context& ctx, const LinearArgs& args);
void linear_backward(Context& ctx, const LinearBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
