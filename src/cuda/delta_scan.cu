// The forward; cuda/delta.cuh has the schedule.

#include <algorithm>

#include "cuda/delta.cuh"
#include "ops/delta_scan.h"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

// y = rmsnorm(o) * norm * silu(z), a warp for every row.
template <typename T>
__device__ void gate_rows(const DeltaShape& s, const DeltaWeights& w, const DeltaSpace& m,
                          const DeltaTokens<const T>& proj, const DeltaTokens<T>& y,
                          const DeltaSequence& sequence, int first, int tokens, int h) {
  const int V = static_cast<int>(s.V), lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int t = static_cast<int>(threadIdx.x) / kWarp; t < tokens; t += kDeltaWarps) {
    const float* const o = m.s_q() + t * m.ld;
    const T* const z = proj.at(sequence, first + t) + s.z() + h * s.V;
    T* const out = y.at(sequence, first + t) + h * s.V;
    float squares = 0;
    for (int i = lane; i < V; i += kWarp) squares = fmaf(o[i], o[i], squares);
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(V) + s.eps);
    for (int i = lane; i < V; i += kWarp) {
      out[i] = from_float<T>(o[i] * rstd * w.norm[i] * silu(to_float(z[i])));
    }
  }
}

template <typename T, bool kShared>
__global__ void __launch_bounds__(kDeltaThreads, 4)
    scan(DeltaShape s, DeltaWeights w, DeltaTokens<const T> proj, DeltaTokens<T> y,
         const int32_t* cu_seqlens, int64_t T_max, int64_t tasks, int chunk, float* pool,
         const int32_t* pool_rows, float* scratch) {
  extern __shared__ float4 shared[];
  const DeltaSpace m = delta_space<kShared>(s, false, shared, scratch);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t index = task / s.H;
    const int h = static_cast<int>(task % s.H);
    const DeltaSequence sequence(cu_seqlens, index, T_max);
    if (sequence.tokens == 0) continue;
    float* const kept = pool ? pool + (pool_rows[index] * s.H + h) * s.V * s.K : nullptr;
    __syncthreads();  // the state of the task before is written
    m.begin_state(s, kept);
    for (int first = 0; first < sequence.tokens; first += chunk) {
      const int tokens = min(chunk, sequence.tokens - first);
      m.load_chunk(s, w, proj, sequence, first, tokens, h, true);
      __syncthreads();
      m.weights(true);
      __syncthreads();
      m.solve<true>();
      __syncthreads();
      m.outputs(m.s_q());
      m.advance_state();
      __syncthreads();
      // The next load_chunk() leaves alone what this reads.
      gate_rows(s, w, m, proj, y, sequence, first, tokens, h);
    }
    if (kept == nullptr) continue;
    const int K = static_cast<int>(s.K), V = static_cast<int>(s.V);
    for (int i = static_cast<int>(threadIdx.x); i < V * K; i += kDeltaThreads) {
      kept[i] = m.state[i / K * m.ld + i % K];
    }
  }
}

}  // namespace

void delta_scan(Context& ctx, const DeltaScanArgs& args) {
  const DeltaShape& s = args.shape;
  const int64_t sequences = sequence_count(args.proj, args.cu_seqlens);
  const int64_t tasks = sequences * s.H;
  const int64_t chunk = args.chunk ? args.chunk : delta_scan_chunk(Device::cuda);
  const int64_t floats = DeltaSpace(s, false, nullptr).floats;
  const bool fits = delta_fits(ctx, floats);
  const int64_t blocks = fits ? tasks : delta_scan_blocks(tasks, floats);
  ScratchScope scope(ctx.scratch);
  float* const scratch = fits ? nullptr : scope.take<float>(blocks * floats).data();
  visit_activation(args.proj.dtype, [&]<typename T>() {
    launch(ctx, "delta_scan", fits ? scan<T, true> : scan<T, false>,
           {.blocks = {static_cast<unsigned>(blocks)},
            .threads = {kDeltaThreads},
            .shared_bytes = fits ? static_cast<size_t>(floats) * sizeof(float) : 0},
           s, DeltaWeights(args.params), DeltaTokens<const T>(args.proj), DeltaTokens<T>(args.y),
           data<int32_t>(args.cu_seqlens), args.proj.dim(1), tasks,
           static_cast<int>(std::min<int64_t>(chunk, kDeltaRows)), data<float>(args.state.delta),
           data<int32_t>(args.state.rows), scratch);
  });
}

}  // namespace mamba3::cuda
