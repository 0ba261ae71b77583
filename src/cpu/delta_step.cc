#include "ops/delta_step.h"

#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/delta_step.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/delta_chunk-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

// One head of one sequence, a row of the state after the other; `scratch` holds 2 K + V floats.
void delta_step_head(const DeltaStepArgs& args, const DeltaWeights& w, int64_t b, int64_t h,
                     float* scratch) {
  const DeltaShape& s = args.shape;
  const int64_t K = s.K, V = s.V;
  const float* proj = args.proj.as<float>() + b * args.proj.stride(0);
  float* state = delta_head_state(s, args.state, b, h);
  float* q = scratch;
  float* k = q + K;
  float* o = k + K;
  unit_vector(K, proj + s.q() + h * K, 1 / std::sqrt(static_cast<float>(K)), q);
  unit_vector(K, proj + s.k() + h * K, 1, k);
  const float alpha = std::exp(log_alpha(s, w, proj, h)), beta = beta_of(s, proj, h);
  const float* v = proj + s.v() + h * V;
  for (int64_t i = 0; i < V; ++i) {
    float* row = state + i * K;
    scale(K, alpha, row, row);
    add_scaled(K, beta * (v[i] - sum_of(K, row, k)), k, row);
    o[i] = sum_of(K, row, q);
  }
  delta_gate(s, w, proj + s.z() + h * V, o, args.y.as<float>() + b * args.y.stride(0) + h * V);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(delta_step_head);

void delta_step(Context& ctx, const DeltaStepArgs& args) {
  const DeltaShape& s = args.shape;
  const DeltaWeights weights(args.params);
  const int64_t floats = small_matrix_stride(2 * s.K + s.V);
  ScratchScope scope(ctx.scratch);
  float* scratch = scope.take<float>(floats * ctx.threads.size()).data();
  ctx.threads.parallel_for(args.proj.dim(0) * s.H, grain_for(s.K * s.V),
                           [&](int64_t begin, int64_t end, int thread) {
                             for (int64_t i = begin; i < end; ++i) {
                               HWY_DYNAMIC_DISPATCH(delta_step_head)
                               (args, weights, i / s.H, i % s.H, scratch + thread * floats);
                             }
                           });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
