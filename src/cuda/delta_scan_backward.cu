// The backward; cuda/delta.cuh has the schedule, and cpu/delta_scan_backward.cc the equations. A
// block walks the chunks forward and keeps the state before each in scratch, then takes them in
// reverse. What the block gives to the gradients of the parameters is a row of scratch, and
// column_sums.cuh adds the rows.

#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/delta.cuh"
#include "ops/delta_scan.h"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

template <typename T>
struct Backward {
  DeltaShape s;
  DeltaWeights w;
  DeltaTokens<const T> proj, d_y;
  DeltaTokens<T> d_proj;
  const int32_t* cu_seqlens;
  int64_t T_max, tasks;
  int chunk;
  DeltaWeights partial;  // (tasks), (tasks) and (tasks, V)
  float* states;         // (blocks, chunks of T_max, V, ld)
  float* scratch;        // where the space is not in shared memory
};

// A chunk of the backward of one head of a sequence.
template <typename T>
struct BackwardChunk {
  const Backward<T>& args;
  const DeltaSpace& m;
  const DeltaSequence& sequence;
  int first, tokens, h;

  // From d_y and o, which is in d_o, to d_o, d_z, d_norm and the first part of d_c: a warp for
  // every row.
  __device__ void gate_backward() const {
    const DeltaShape& s = args.s;
    const int V = static_cast<int>(s.V), lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int t = warp; t < kDeltaRows; t += kDeltaWarps) {
      float along_state = 0;
      if (t < tokens) {
        float* const o = m.d_o + t * m.ld;
        const float* const s_q = m.s_q() + t * m.ld;
        const T* const z = args.proj.at(sequence, first + t) + s.z() + h * s.V;
        const T* const d_y = args.d_y.at(sequence, first + t) + h * s.V;
        T* const d_z = args.d_proj.at(sequence, first + t) + s.z() + h * s.V;
        float* const d_norm = m.d_norm + warp * m.V;
        float squares = 0;
        for (int i = lane; i < V; i += kWarp) squares = fmaf(o[i], o[i], squares);
        const float rstd = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(V) + s.eps);
        float mean = 0;
        for (int i = lane; i < V; i += kWarp) {
          const float gate = to_float(z[i]), d = to_float(d_y[i]), sig = sigmoid(gate);
          const float normed = o[i] * rstd, d_weighted = d * (gate * sig);
          const float slope = sig * fmaf(gate, 1 - sig, 1.0f);
          d_z[i] = from_float<T>(d * slope * (normed * args.w.norm[i]));
          d_norm[i] = fmaf(d_weighted, normed, d_norm[i]);
          mean = fmaf(d_weighted * args.w.norm[i], normed, mean);
        }
        mean = warp_sum(mean) / static_cast<float>(V);
        for (int i = lane; i < V; i += kWarp) {
          const float d_normed = to_float(d_y[i]) * silu(to_float(z[i])) * args.w.norm[i];
          o[i] = rstd * fmaf(-o[i] * rstd, mean, d_normed);
          along_state = fmaf(o[i], s_q[i], along_state);
        }
        along_state = warp_sum(along_state);
      }
      if (lane == 0) m.d_c[t] = along_state;
    }
  }

  // d_u, in d_r; what of it comes from the state after the chunk, in s_q; d_p, not yet decayed.
  __device__ void updates_backward() const {
    for_delta_tiles(kDeltaRows, m.V, [&](DeltaTile& tile) {
      tile.add_dots(m.kq, m.ld, m.Z, m.ld, m.K);
#pragma unroll
      for (int i = 0; i < DeltaTile::kRows; ++i) tile.scale(i, m.to_end[tile.row + i]);
      tile.each(
          [&](int i, int j, int row, int col) { m.s_q()[row * m.ld + col] = tile.sum[i][j]; });
      tile.add_transposed(m.p, kDeltaStride, m.d_o, m.ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) { m.d_r[row * m.ld + col] = tile.sum[i][j]; });
    });
    for_delta_tiles(kDeltaRows, kDeltaRows, [&](DeltaTile& tile) {
      tile.add_dots(m.d_o, m.ld, m.u, m.ld, m.V);
      tile.each([&](int i, int j, int row, int col) {
        m.d_p[row * kDeltaStride + col] = col <= row ? tile.sum[i][j] : 0.0f;
      });
    });
  }

  // d_r from d_u, in place. A thread has whole columns.
  __device__ void solve_back() const {
    for (int col = static_cast<int>(threadIdx.x); col < m.V; col += kDeltaThreads) {
      float x[kDeltaRows];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) x[i] = m.d_r[i * m.ld + col];
#pragma unroll
      for (int i = kDeltaRows - 1; i > 0; --i) {
        const float d_v = m.beta[i] * x[i];
#pragma unroll
        for (int j = 0; j < i; ++j) x[j] = fmaf(m.a[i * kDeltaStride + j], d_v, x[j]);
      }
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) m.d_r[i * m.ld + col] = x[i];
    }
  }

  // d_a and d_p become the gradients of k k^T and q k^T, a and p what they give to those of c.
  __device__ void weights_backward() const {
    for_delta_tiles(kDeltaRows, kDeltaRows, [&](DeltaTile& tile) {
      tile.add_dots(m.d_r, m.ld, m.u, m.ld, m.V);
      tile.each([&](int i, int j, int row, int col) {
        const int at = row * kDeltaStride + col;
        const float decay = col <= row ? m.decay(row, col) : 0.0f;
        const float d_a = col < row ? tile.sum[i][j] : 0.0f, d_p = m.d_p[at];
        m.a[at] *= d_a;  // zero where d_a is, as a is there
        m.p[at] = col < row ? m.p[at] * d_p : 0.0f;
        m.d_a[at] = -m.beta[row] * decay * d_a;
        m.d_p[at] = decay * d_p;
      });
    });
  }

  // d_v, d_beta, d_c; then d_o times exp(c_t), and d_r times -beta exp(c_t): a warp for every row.
  __device__ void rows_backward() const {
    const DeltaShape& s = args.s;
    const int V = static_cast<int>(s.V), lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int t = static_cast<int>(threadIdx.x) / kWarp; t < kDeltaRows; t += kDeltaWarps) {
      const float beta = m.beta[t], from_start = m.from_start[t];
      const int row = t * m.ld;
      float with_v = 0, with_ks = 0, at_end = 0, d_beta = 0, d_c = 0;
      for (int i = lane; i < m.V; i += kWarp) {
        const float d_r = m.d_r[row + i];
        with_v = fmaf(d_r, m.v[row + i], with_v);
        with_ks = fmaf(d_r, m.s_kq[row + i], with_ks);
        at_end = fmaf(m.u[row + i], m.s_q()[row + i], at_end);
        if (t < tokens && i < V) {
          args.d_proj.at(sequence, first + t)[s.v() + h * s.V + i] = from_float<T>(beta * d_r);
        }
        m.d_o[row + i] *= from_start;
        m.d_r[row + i] = -beta * from_start * d_r;
      }
      if (lane < kDeltaRows) {
        const int across = t * kDeltaStride + lane, down = lane * kDeltaStride + t;
        d_beta = m.a[across];
        d_c = fmaf(beta, m.a[across], m.p[across]) - fmaf(m.beta[lane], m.a[down], m.p[down]);
      }
      with_ks = warp_sum(with_ks);
      at_end = warp_sum(at_end);
      d_beta = warp_sum(with_v + d_beta) - with_ks;
      d_c = warp_sum(d_c) - beta * with_ks - at_end;
      if (lane == 0) {
        m.d_beta[t] = d_beta;
        m.d_c[t] += d_c;
        m.at_end[t] = at_end;
      }
    }
  }

  // d_q into v, and d_k into the keys' part of s_kq.
  __device__ void keys_backward() const {
    const float *k = m.kq, *q = m.q();
    for_delta_tiles(kDeltaRows, m.K, [&](DeltaTile& tile) {
      tile.add(m.d_o, m.ld, m.state, m.ld, m.V);
      tile.add(m.d_p, kDeltaStride, k, m.ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) { m.v[row * m.ld + col] = tile.sum[i][j]; });
    });
    for_delta_tiles(kDeltaRows, m.K, [&](DeltaTile& tile) {
      tile.add(m.u, m.ld, m.Z, m.ld, m.V);
#pragma unroll
      for (int i = 0; i < DeltaTile::kRows; ++i) tile.scale(i, m.to_end[tile.row + i]);
      tile.add(m.d_r, m.ld, m.state, m.ld, m.V);
      tile.add_transposed(m.d_p, kDeltaStride, q, m.ld, kDeltaRows);
      tile.add(m.d_a, kDeltaStride, k, m.ld, kDeltaRows);
      tile.add_transposed(m.d_a, kDeltaStride, k, m.ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) { m.s_kq[row * m.ld + col] = tile.sum[i][j]; });
    });
  }

  // Z before the chunk. Returns this thread's part of the product of Z and the state.
  __device__ float state_backward() const {
    const float left = m.from_start[kDeltaRows - 1];
    float along = 0;
    for_delta_tiles(m.V, m.K, [&](DeltaTile& tile) {
      tile.add_transposed(m.d_o, m.ld, m.q(), m.ld, kDeltaRows);
      tile.add_transposed(m.d_r, m.ld, m.kq, m.ld, kDeltaRows);
      tile.each([&](int i, int j, int row, int col) {
        float& element = m.Z[row * m.ld + col];
        along = fmaf(element, m.state[row * m.ld + col], along);
        element = fmaf(left, element, tile.sum[i][j]);
      });
    });
    return left * along;
  }

  // q and k before they were normed: a warp for every row.
  __device__ void unit_backward() const {
    const DeltaShape& s = args.s;
    const int K = static_cast<int>(s.K), lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int i = static_cast<int>(threadIdx.x) / kWarp; i < 2 * tokens; i += kDeltaWarps) {
      const bool is_q = i >= tokens;
      const int t = is_q ? i - tokens : i;
      const float* const unit = (is_q ? m.q() : m.kq) + t * m.ld;
      const float* const d_unit = (is_q ? m.v : m.s_kq) + t * m.ld;
      T* const out = args.d_proj.at(sequence, first + t) + (is_q ? s.q() : s.k()) + h * s.K;
      // q is 1 / sqrt(K) times a unit vector.
      const float square = is_q ? static_cast<float>(K) : 1.0f;
      const float scale = m.rstd[is_q ? kDeltaRows + t : t] / sqrtf(square);
      float along = 0;
      for (int j = lane; j < K; j += kWarp) along = fmaf(unit[j], d_unit[j], along);
      along = warp_sum(along) * square;
      for (int j = lane; j < K; j += kWarp) {
        out[j] = from_float<T>(scale * fmaf(-along, unit[j], d_unit[j]));
      }
    }
  }

  // b and a, by the first warp, a lane a token; at_state is what the state before the chunk gives
  // to the gradient of c at its end.
  __device__ void decays_backward(float at_state, float& d_A_log, float& d_dt_bias) const {
    const DeltaShape& s = args.s;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool is_token = lane < tokens;
    const float end = warp_sum(lane < kDeltaRows ? m.at_end[lane] : 0.0f) + at_state;
    float d_log_alpha = is_token ? m.d_c[lane] : 0.0f;
    if (lane == tokens - 1) d_log_alpha += end;
      // c of a token and of the later ones contain its log alpha.
#pragma unroll
    for (int distance = 1; distance < kDeltaRows; distance *= 2) {
      const float later = __shfl_down_sync(~0u, d_log_alpha, distance);
      if (lane + distance < kDeltaRows) d_log_alpha += later;
    }
    if (!is_token) return;
    const T* const row = args.proj.at(sequence, first + lane);
    T* const d_row = args.d_proj.at(sequence, first + lane);
    const float slope = sigmoid(to_float(row[s.a() + h]) + args.w.dt_bias[h]);
    const float d_a = -d_log_alpha * expf(args.w.A_log[h]) * slope;
    d_row[s.a() + h] = from_float<T>(d_a);
    d_row[s.b() + h] =
        from_float<T>(m.d_beta[lane] * m.beta[lane] * sigmoid(-to_float(row[s.b() + h])));
    d_A_log = fmaf(d_log_alpha, m.g[lane], d_A_log);
    d_dt_bias += d_a;
  }
};

template <typename T, bool kShared>
__global__ void __launch_bounds__(kDeltaThreads, 3) scan_backward(Backward<T> args) {
  extern __shared__ float4 shared[];
  __shared__ float sums[kDeltaWarps];
  const DeltaShape& s = args.s;
  const DeltaSpace m = delta_space<kShared>(s, true, shared, args.scratch);
  const int thread = static_cast<int>(threadIdx.x);
  const int state_floats = m.V * m.ld;
  const int64_t chunks_max = (args.T_max + args.chunk - 1) / args.chunk;
  float* const states = args.states + blockIdx.x * chunks_max * state_floats;

  for (int64_t task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    const int h = static_cast<int>(task % s.H);
    const DeltaSequence sequence(args.cu_seqlens, task / s.H, args.T_max);
    const int chunks = (sequence.tokens + args.chunk - 1) / args.chunk;
    __syncthreads();  // the task before is over
    m.begin_state(s, nullptr);
    for (int i = thread; i < state_floats; i += kDeltaThreads) m.Z[i] = 0;
    for (int i = thread; i < kDeltaWarps * m.V; i += kDeltaThreads) m.d_norm[i] = 0;
    __syncthreads();

    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int i = thread; i < state_floats; i += kDeltaThreads) {
        states[int64_t{chunk} * state_floats + i] = m.state[i];
      }
      if (chunk + 1 == chunks) break;
      m.load_chunk(s, args.w, args.proj, sequence, chunk * args.chunk, args.chunk, h, false);
      __syncthreads();
      m.weights(false);
      __syncthreads();
      m.template solve<true>();
      __syncthreads();
      m.advance_state();
      __syncthreads();
    }

    float d_A_log = 0, d_dt_bias = 0;  // of the first warp's lanes
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const int first = chunk * args.chunk, tokens = min(args.chunk, sequence.tokens - first);
      const BackwardChunk<T> back{args, m, sequence, first, tokens, h};
      // Each thread reads what it wrote.
      for (int i = thread; i < state_floats; i += kDeltaThreads) {
        m.state[i] = states[int64_t{chunk} * state_floats + i];
      }
      m.load_chunk(s, args.w, args.proj, sequence, first, tokens, h, true);
      __syncthreads();
      m.weights(true);
      __syncthreads();
      m.template solve<false>();
      __syncthreads();
      m.outputs(m.d_o);
      __syncthreads();
      back.gate_backward();
      __syncthreads();
      back.updates_backward();
      __syncthreads();
      back.solve_back();
      __syncthreads();
      back.weights_backward();
      __syncthreads();
      back.rows_backward();
      __syncthreads();
      back.keys_backward();
      __syncthreads();
      back.unit_backward();
      const float at_state = block_sum(back.state_backward(), sums);
      if (thread < kWarp) back.decays_backward(at_state, d_A_log, d_dt_bias);
      __syncthreads();
    }

    __syncthreads();
    for (int i = thread; i < s.V; i += kDeltaThreads) {
      float sum = 0;
      for (int warp = 0; warp < kDeltaWarps; ++warp) sum += m.d_norm[warp * m.V + i];
      args.partial.norm[task * s.V + i] = sum;
    }
    if (thread >= kWarp) continue;
    d_A_log = warp_sum(d_A_log);
    d_dt_bias = warp_sum(d_dt_bias);
    if (thread == 0) args.partial.A_log[task] = d_A_log, args.partial.dt_bias[task] = d_dt_bias;
  }
}

}  // namespace

void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args) {
  constexpr const char* kOp = "delta_scan_backward";
  const DeltaShape& s = args.shape;
  const int64_t T_max = args.proj.dim(1);
  const int64_t sequences = sequence_count(args.proj, args.cu_seqlens);
  const int64_t tasks = sequences * s.H;
  if (tasks == 0) return;
  const int64_t wanted = args.chunk ? args.chunk : delta_scan_chunk(Device::cuda);
  const int64_t chunk = std::min<int64_t>(wanted, kDeltaRows);
  const DeltaSpace space(s, true, nullptr);
  const bool fits = delta_fits(ctx, space.floats);
  const int64_t states = (T_max + chunk - 1) / chunk * space.V * space.ld;
  const int64_t blocks = delta_scan_blocks(tasks, states + (fits ? 0 : space.floats));

  ScratchScope scope(ctx.scratch);
  DeltaWeights partial;
  partial.A_log = scope.take<float>(tasks).data();
  partial.dt_bias = scope.take<float>(tasks).data();
  partial.norm = scope.take<float>(tasks * s.V).data();
  float* const kept = scope.take<float>(blocks * states).data();
  float* const scratch = fits ? nullptr : scope.take<float>(blocks * space.floats).data();
  visit_activation(args.proj.dtype, [&]<typename T>() {
    const Backward<T> backward{.s = s,
                               .w = DeltaWeights(args.params),
                               .proj = DeltaTokens<const T>(args.proj),
                               .d_y = DeltaTokens<const T>(args.d_y),
                               .d_proj = DeltaTokens<T>(args.d_proj),
                               .cu_seqlens = data<int32_t>(args.cu_seqlens),
                               .T_max = T_max,
                               .tasks = tasks,
                               .chunk = static_cast<int>(chunk),
                               .partial = partial,
                               .states = kept,
                               .scratch = scratch};
    launch(ctx, kOp, fits ? scan_backward<T, true> : scan_backward<T, false>,
           {.blocks = {static_cast<unsigned>(blocks)},
            .threads = {kDeltaThreads},
            .shared_bytes = fits ? static_cast<size_t>(space.floats) * sizeof(float) : 0},
           backward);
  });
  const DeltaWeights totals(args.d_params);
  add_rows_to(ctx, kOp, partial.A_log, sequences, s.H, totals.A_log);
  add_rows_to(ctx, kOp, partial.dt_bias, sequences, s.H, totals.dt_bias);
  add_rows_to(ctx, kOp, partial.norm, tasks, s.V, totals.norm);
}

}  // namespace mamba3::cuda
