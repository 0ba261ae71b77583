#include "ops/swiglu.h"

#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/swiglu.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void swiglu_row(const float* y, const float* gate, float* out, int64_t F) {
  for_each_vector(F, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Mul(access.load(y + i), silu(access.load(gate + i))), out + i);
  });
}

// d_y = d_out silu(gate);  d_gate = d_out y silu'(gate) with silu'(g) = s (1 + g (1 - s)), s =
// sigmoid(g).
void swiglu_backward_row(const float* y, const float* gate, const float* d_out, float* d_y,
                         float* d_gate, int64_t F) {
  const Vector one = hn::Set(kLanes, 1.0f);
  for_each_vector(F, [&](auto access, int64_t i) HWY_ATTR {
    const Vector up = access.load(y + i), g = access.load(gate + i), d = access.load(d_out + i);
    const Vector s = sigmoid(g);
    const Vector slope = hn::Mul(s, hn::MulAdd(g, hn::Sub(one, s), one));
    access.store(hn::Mul(d, hn::Mul(g, s)), d_y + i);
    access.store(hn::Mul(hn::Mul(d, up), slope), d_gate + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(swiglu_row);
HWY_EXPORT(swiglu_backward_row);

void swiglu(Context& ctx, const SwigluArgs& args) {
  const int64_t M = args.out.dim(0), F = args.out.dim(1);
  const auto run_row = HWY_DYNAMIC_DISPATCH(swiglu_row);
  ctx.threads.parallel_for(M, grain_for(F), [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      const float* y = args.y_gate.as<float>() + m * args.y_gate.stride(0);
      run_row(y, y + F, args.out.as<float>() + m * args.out.stride(0), F);
    }
  });
}

void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args) {
  const int64_t M = args.d_out.dim(0), F = args.d_out.dim(1);
  const auto run_row = HWY_DYNAMIC_DISPATCH(swiglu_backward_row);
  ctx.threads.parallel_for(M, grain_for(F), [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      const float* y = args.y_gate.as<float>() + m * args.y_gate.stride(0);
      float* d_y = args.d_y_gate.as<float>() + m * args.d_y_gate.stride(0);
      run_row(y, y + F, args.d_out.as<float>() + m * args.d_out.stride(0), d_y, d_y + F, F);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
