// The forward; cuda/delta.cuh has the schedule.

#include <algorithm>

#include "cuda/delta.cuh"
#include "ops/delta_scan.h"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

// y = rmsnorm(o) * norm * silu(z) for o in the place of s_q.
template <typename T>
__device__ void gate_rows(const DeltaShape& s, const DeltaWeights& w, const DeltaSpace& m,
                          const DeltaTokens<const T>& proj, const DeltaTokens<T>& y,
                          const DeltaSequence& sequence, int first, int tokens, int h) {
  const DeltaRow row;
  const int V = static_cast<int>(s.V);
  const bool present = row.t < tokens;
  const int t = first + (present ? row.t : 0);
  const T* const z = proj.at(sequence, t) + s.z() + h * s.V;
  T* const out = y.at(sequence, t) + h * s.V;
  float* const o = m.s_q() + row.t * m.ld;
  // o becomes all but the factor that is known at the end: each lane what it reads again.
  float squares = 0;
  row.each(
      V,
      [&](int i) {
        return float2{to_float(z[i]), w.norm[i]};
      },
      [&](int i, const float2& z_norm) {
        squares = fmaf(o[i], o[i], squares);
        o[i] *= z_norm.y * silu(z_norm.x);
      });
  const float rstd = 1.0f / sqrtf(DeltaRow::sum(squares) / static_cast<float>(V) + s.eps);
  if (!present) return;
  for (int i = row.lane; i < V; i += DeltaRow::kLanes) out[i] = from_float<T>(o[i] * rstd);
}

template <bool kShared, int kK, int kV, typename T>
__global__ void __launch_bounds__(kDeltaThreads, 4)
    scan(DeltaShape shape, DeltaWeights w, DeltaTokens<const T> proj, DeltaTokens<T> y,
         const int32_t* cu_seqlens, int64_t T_max, int64_t tasks, int chunk, float* pool,
         const int32_t* pool_rows, float* scratch, int scratch_floats) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  const DeltaShape s = known_delta_shape<kK, kV>(shape);
  const DeltaSpace m(s, false, true, delta_base<kShared>(shared, scratch, scratch_floats));
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
      m.template load_chunk<true>(s, w, proj, sequence, first, tokens, h);
      __syncthreads();
      m.template weights<true>(m.state, m.ld);
      __syncthreads();
      m.template solve<true>(
          [&](int i, int col, float u) { m.v[i * m.ld + col] = m.to_end[i] * u; }, m.s_q());
      __syncthreads();
      m.advance_state(m.state, m.ld, [&](const WalkTile& tile) { tile.store(m.state, m.ld); });
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
  const int64_t floats = DeltaSpace(s, false, true, nullptr).floats;
  const bool fits = delta_fits(ctx, floats);
  const int64_t blocks = fits ? tasks : delta_scan_blocks(tasks, floats);
  ScratchScope scope(ctx.scratch);
  float* const scratch = fits ? nullptr : scope.take<float>(blocks * floats).data();
  visit_activation(args.proj.dtype, [&]<typename T>() {
    visit_delta(s, fits, [&]<bool kShared, int kK, int kV>() {
      launch(ctx, "delta_scan", scan<kShared, kK, kV, T>,
             {.blocks = {static_cast<unsigned>(blocks)},
              .threads = {kDeltaThreads},
              .shared_bytes = fits ? static_cast<size_t>(floats) * sizeof(float) : 0},
             s, DeltaWeights(args.params), DeltaTokens<const T>(args.proj), DeltaTokens<T>(args.y),
             data<int32_t>(args.cu_seqlens), args.proj.dim(1), tasks,
             static_cast<int>(std::min<int64_t>(chunk, kDeltaRows)), data<float>(args.state.delta),
             data<int32_t>(args.state.rows), scratch, static_cast<int>(floats));
    });
  });
}

}  // namespace mamba3::cuda
