// One token of every sequence, the state in place. A block is one head of one sequence; its warps
// take the rows of the state in turn, each of which is read twice, the second time from the cache:
//   u = beta (v_p - alpha S_p . k),   S_p = alpha S_p + u k,   o_p = S_p . q

#include "cuda/delta.cuh"
#include "ops/delta_step.h"

namespace mamba3::cuda {

namespace {

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    step_head(DeltaShape s, DeltaWeights w, const T* proj, int64_t proj_stride, T* y,
              int64_t y_stride, float* pool, const int32_t* pool_rows) {
  MAMBA3_DYNAMIC_SHARED(float, shared);
  __shared__ float sums[kDeltaWarps];
  const int K = static_cast<int>(s.K), V = static_cast<int>(s.V);
  float* const k = shared;  // (K)
  float* const q = k + K;   // (K)
  float* const o = q + K;   // (V)
  const int64_t b = blockIdx.x / s.H;
  const int h = static_cast<int>(blockIdx.x % s.H);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarp, lane = thread % kWarp;
  proj += b * proj_stride;
  y += b * y_stride + h * s.V;
  float* const state = pool + (pool_rows[b] * s.H + h) * s.V * s.K;

  if (warp < 2) {  // k and q
    const T* const from = proj + (warp == 0 ? s.k() : s.q()) + h * s.K;
    float squares = 0;
    for (int i = lane; i < K; i += kWarp) {
      const float x = to_float(from[i]);
      squares = fmaf(x, x, squares);
    }
    float factor = 1.0f / sqrtf(warp_sum(squares) + kDeltaNormEps);
    if (warp == 1) factor /= sqrtf(static_cast<float>(K));
    for (int i = lane; i < K; i += kWarp) (warp == 0 ? k : q)[i] = to_float(from[i]) * factor;
  }
  const float rate = softplus(to_float(proj[s.a() + h]) + w.dt_bias[h]);
  const float alpha = expf(-expf(w.A_log[h]) * rate);
  const float beta = (s.negative ? 2.0f : 1.0f) * sigmoid(to_float(proj[s.b() + h]));
  __syncthreads();

  for (int p = warp; p < V; p += kDeltaWarps) {
    float* const row = state + int64_t{p} * K;
    float seen = 0, out = 0;
    for (int i = lane; i < K; i += kWarp) seen = fmaf(row[i], k[i], seen);
    const float v = to_float(proj[s.v() + h * s.V + p]);
    const float u = beta * (v - alpha * warp_sum(seen));
    for (int i = lane; i < K; i += kWarp) {
      const float element = fmaf(u, k[i], alpha * row[i]);
      row[i] = element;
      out = fmaf(element, q[i], out);
    }
    out = warp_sum(out);
    if (lane == 0) o[p] = out;
  }
  __syncthreads();

  float squares = 0;
  for (int i = thread; i < V; i += kDeltaThreads) squares = fmaf(o[i], o[i], squares);
  const float rstd = 1.0f / sqrtf(block_sum(squares, sums) / static_cast<float>(V) + s.eps);
  for (int i = thread; i < V; i += kDeltaThreads) {
    const float z = to_float(proj[s.z() + h * s.V + i]);
    y[i] = from_float<T>(o[i] * rstd * w.norm[i] * silu(z));
  }
}

}  // namespace

void delta_step(Context& ctx, const DeltaStepArgs& args) {
  const DeltaShape& s = args.shape;
  visit_activation(args.proj.dtype, [&]<typename T>() {
    launch(ctx, "delta_step", step_head<T>,
           {.blocks = {static_cast<unsigned>(args.proj.dim(0) * s.H)},
            .threads = {kDeltaThreads},
            .shared_bytes = static_cast<size_t>(2 * s.K + s.V) * sizeof(float)},
           s, DeltaWeights(args.params), data<T>(args.proj), args.proj.stride(0), data<T>(args.y),
           args.y.stride(0), data<float>(args.state.delta), data<int32_t>(args.state.rows));
  });
}

}  // namespace mamba3::cuda
