#include "ops/mixer_step.h"

#include "cpu/mixer.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/mixer_step.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/mixer-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

// One head of one sequence. The state is read and written once: for every row p of S (P,N),
//   S_p = a S_p + sum_r before_rp k_prev_r + now_rp k_r,   y_rp = S_p . q_r + D v_rp.
void step_head(const MixerStepArgs& args, const MixerWeights& w, const MixerTokens& terms,
               int64_t b, int64_t h, float* scratch) {
  const MixerShape& s = args.shape;
  const int64_t P = s.P, N = s.N, R = s.R;
  const int64_t g = h / (s.H / s.G);
  const HeadState state(s, args.state, b, h);
  const float* proj = args.proj.as<float>() + b * args.proj.stride(0);
  const float dt = terms.dt[b * s.H + h], lam = terms.lam[b * s.H + h];
  const float a = std::exp(terms.A_dt[b * s.H + h]);
  float* cosine = scratch;
  float* sine = cosine + s.S;
  float* k = sine + s.S;        // (R, N)
  float* q = k + R * N;         // (R, N)
  float* v = q + R * N;         // (R, P)
  float* now = v + R * P;       // (R, P) weight of k_r in row p
  float* before = now + R * P;  // (R, P) weight of k_prev_r in row p
  float* y = before + R * P;    // (R, P)
  const float* x = proj + s.x() + h * P;

  if (s.rope == Rope::standard) {
    standard_angle(s.S, 1, state.angle, state.angle, cosine, sine);
  } else {
    advance_angle(s.S, terms.theta + b * s.S, dt, state.angle, cosine, sine);
  }
  for (int64_t r = 0; r < R; ++r) {
    const int64_t rg = r * s.G + g, hr = h * R + r;
    key_or_query(s, proj + s.B() + rg * N, terms.rstd_B[b * R * s.G + rg], w.B_norm, w.B_bias, hr,
                 cosine, sine, k + r * N);
    key_or_query(s, proj + s.C() + rg * N, terms.rstd_C[b * R * s.G + rg], w.C_norm, w.C_bias, hr,
                 cosine, sine, q + r * N);
    value(s, w, h, r, x, v + r * P);
    value(s, w, h, r, state.v_prev, before + r * P);
    scale(P, (1 - lam) * dt * a, before + r * P, before + r * P);
    scale(P, lam * dt, v + r * P, now + r * P);
  }
  for (int64_t p = 0; p < P; ++p) {
    float* row = state.ssm + p * N;
    scale(N, a, row, row);
    for (int64_t r = 0; r < R; ++r) {
      add_scaled(N, before[r * P + p], state.k_prev(r), row);
      add_scaled(N, now[r * P + p], k + r * N, row);
    }
    for (int64_t r = 0; r < R; ++r) {
      y[r * P + p] = sum_of(N, row, q + r * N) + w.D[h] * v[r * P + p];
    }
  }
  float* out = args.y.as<float>() + b * args.y.stride(0) + h * P;
  for (int64_t r = 0; r < R; ++r) {
    gate(s, w, h, r, proj + s.z() + h * P, y + r * P, out);
    copy(N, k + r * N, state.k_prev(r));
  }
  copy(P, x, state.v_prev);
}

void step_token(const MixerStepArgs& args, const MixerWeights& w, const MixerTokens& terms,
                int64_t b) {
  token_terms(args.shape, w, args.proj.as<float>() + b * args.proj.stride(0), b, terms);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(step_head);
HWY_EXPORT(step_token);

void mixer_step(Context& ctx, const MixerStepArgs& args) {
  const MixerShape& s = args.shape;
  const int64_t B = args.proj.dim(0);
  const MixerWeights weights(args.params);
  ScratchScope scope(ctx.scratch);
  const MixerTokens terms(s, B, scope);
  ctx.threads.parallel_for(B, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) HWY_DYNAMIC_DISPATCH(step_token)(args, weights, terms, b);
  });
  const int64_t per_thread = small_matrix_stride(2 * s.S + 2 * s.R * s.N + 4 * s.R * s.P);
  float* scratch = scope.take<float>(per_thread * ctx.threads.size()).data();
  // Half the heads a task on two threads: enough to balance, few enough to cost nothing.
  const int64_t grain = std::max<int64_t>(1, B * s.H / (4 * ctx.threads.size()));
  ctx.threads.parallel_for(B * s.H, grain, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      HWY_DYNAMIC_DISPATCH(step_head)
      (args, weights, terms, i / s.H, i % s.H, scratch + thread * per_thread);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
