// The backward; cuda/delta.cuh has the schedule, and cpu/delta_scan_backward.cc the equations. A
// block walks the chunks forward and keeps the state before each in scratch, then takes them in
// reverse. Z, the gradient of the state after the chunk, lies in scratch too: shared memory has one
// place for it and the state, by turns, so that four blocks fit on a multiprocessor. They are
// copied there while phases that need neither go on. A chunk of the way back has nine phases:
//   1. k, q, v, decays
//   2. a, p; exp(c_t) S k and exp(c_t) S q
//   3. u, o                                                   Z arrives until 5
//   4. back through gate and norm: d_o, d_z, d_norm
//   5. exp(c_Q - c_t) Z k, and what d_k has of Z
//   6. d_r, d_v                                               the state arrives until 8
//   7. the gradients of q k^T and k k^T; sums over rows; d_o and d_r scaled for the state
//   8. d_q, d_k, Z before the chunk
//   9. q and k back through their norms; b and a              the state before arrives until 2
// What the block gives to the gradients of the parameters is a row of scratch, and column_sums.cuh
// adds the rows.

#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/delta.cuh"
#include "cuda/mma.cuh"
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
  float* matrices;       // (blocks, chunks of T_max + 1, V, K) of the space: states, and Z
  float* scratch;        // where the space is not in shared memory
  int scratch_floats;    // of a block
};

// A chunk of the backward of one head of a sequence.
template <typename T>
struct BackwardChunk {
  const Backward<T>& args;
  const DeltaShape& s;  // of `args`, with what the compiler knows
  const DeltaSpace& m;
  const DeltaSequence& sequence;
  int first, tokens, h;

  // Gradients that take the place of something else, as d_q that of u.
  __device__ float* d_r() const { return m.v; }
  __device__ float* scaled_d_r() const { return m.s_kq; }   // times -beta exp(c_t)
  __device__ float* scaled_d_o() const { return m.s_q(); }  // times exp(c_t)

  // From d_y and o, which is in d_o, to d_o, d_z, d_norm and the first part of d_c.
  __device__ void gate_backward() const {
    const DeltaRow row;
    const int V = static_cast<int>(s.V), warp = static_cast<int>(threadIdx.x) / kWarp;
    const bool present = row.t < tokens, sums_rows = threadIdx.x % kWarp < DeltaRow::kLanes;
    const int64_t t = first + (present ? row.t : 0);
    const T* const z = args.proj.at(sequence, t) + s.z() + h * s.V;
    const T* const d_y = args.d_y.at(sequence, t) + h * s.V;
    T* const d_z = args.d_proj.at(sequence, t) + s.z() + h * s.V;
    float* const o = m.d_o + row.t * m.ld;
    const float* const s_q = m.s_q() + row.t * m.ld;
    // What d_y and z become on the way waits in places that nothing else has now.
    float* const d_weighted = m.v + row.t * m.ld;
    float* const d_silu = m.d_k + row.t * m.ld;
    row.each(
        V,
        [&](int i) {
          return float2{to_float(z[i]), present ? to_float(d_y[i]) : 0.0f};
        },
        [&](int i, const float2& z_and_d) {
          d_silu[i] = z_and_d.x;
          d_weighted[i] = z_and_d.y;
        });
    float squares = 0, mean = 0;
#pragma unroll 2  // the code of a chunk is long for the caches of instructions
    for (int i = row.lane; i < V; i += DeltaRow::kLanes) {
      const float gate = d_silu[i], d = d_weighted[i], sig = sigmoid(gate);
      const float d_i = d * (gate * sig);
      squares = fmaf(o[i], o[i], squares);
      mean = fmaf(d_i * m.norm[i], o[i], mean);
      d_weighted[i] = d_i;
      d_silu[i] = d * (sig * fmaf(gate, 1 - sig, 1.0f));
    }
    const float size = static_cast<float>(V);
    const float rstd = 1.0f / sqrtf(DeltaRow::sum(squares) / size + s.eps);
    mean = DeltaRow::sum(mean) * rstd / size;
    float along_state = 0;
#pragma unroll 2
    for (int begin = 0; begin < V; begin += DeltaRow::kLanes) {  // all lanes of a warp together
      const int i = begin + row.lane;
      float d_norm = 0;
      if (present && i < V) {
        const float normed = o[i] * rstd, d_i = d_weighted[i], weight = m.norm[i];
        const float d_o = rstd * fmaf(-normed, mean, d_i * weight);
        d_norm = d_i * normed;
        d_z[i] = from_float<T>(d_silu[i] * (normed * weight));
        along_state = fmaf(d_o, s_q[i], along_state);
        o[i] = d_o;
      }
      // Over the rows of the warp.
#pragma unroll
      for (int apart = DeltaRow::kLanes; apart < kWarp; apart *= 2) {
        d_norm += __shfl_xor_sync(~0u, d_norm, apart);
      }
      if (sums_rows && i < V) m.d_norm[warp * m.V + i] += d_norm;
    }
    along_state = DeltaRow::sum(along_state);
    if (row.lane == 0) m.d_c[row.t] = along_state;
  }

  // What the state after the chunk gives to d_u, to the place of d_r, and to d_k.
  __device__ void from_state_after(const float* Z, int ldZ) const {
    DeltaTurn turn;
    turn.spread_tiles(kDeltaRows, m.V, [&](WalkTile& tile) {
      tile.add_dots(m.kq, m.ld, Z, ldZ, m.K);
      tile.each(
          [&](float sum, int row, int col) { d_r()[row * m.ld + col] = m.to_end[row] * sum; });
    });
    turn.tiles(kDeltaRows, m.K, [&](WalkTile& tile) {
      tile.add(m.u, m.ld, Z, ldZ, m.V);
#pragma unroll
      for (int i = 0; i < WalkTile::kSize; ++i) tile.scale_row(i, m.to_end[tile.row(i)]);
      tile.store(m.d_k, m.ld);
    });
  }

  // d_u += p^T d_o, then d_r, in the same place; d_v. A thread has whole columns: here the first
  // threads, and in solve() the last.
  __device__ void solve_back() const {
    for (int col = static_cast<int>(threadIdx.x); col < m.V; col += kDeltaThreads) {
      float x[kDeltaRows];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) x[i] = d_r()[i * m.ld + col];
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) {
        DeltaSpace::add_row_to(x, m.d_o[i * m.ld + col], m.p, i, i + 1);
      }
#pragma unroll
      for (int i = kDeltaRows - 1; i > 0; --i) {
        DeltaSpace::add_row_to(x, m.beta[i] * x[i], m.a, i, i);
      }
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) d_r()[i * m.ld + col] = x[i];
      if (col >= s.V) continue;
#pragma unroll
      for (int i = 0; i < kDeltaRows; ++i) {
        if (i >= tokens) break;
        args.d_proj.at(sequence, first + i)[s.v() + h * s.V + col] =
            from_float<T>(m.beta[i] * x[i]);
      }
    }
  }

  // p becomes the gradient of q k^T, and a that of k k^T plus its transpose; what they give to d_c;
  // d_beta times beta = d_r u.
  __device__ void weights_backward() const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto weigh = [&](const auto& dots, int row, const WalkTile& tile) {
      const int t = row % kDeltaRows;
      const bool is_r = row >= kDeltaRows;
      const float beta = m.beta[t];
      float* const weights = (is_r ? m.a : m.p) + t * kDeltaStride;
      float of_row = 0;
#pragma unroll
      for (int j = 0; j < WalkTile::kSize; ++j) {
        const int col = tile.col(j);
        const float decay = col <= t ? m.decay(t, col) : 0.0f;
        float to_c = 0;
        if (col < t) to_c = (is_r ? beta : 1.0f) * (weights[col] * dots[j]);
        of_row += to_c;
        const float of_column = warp_sum(to_c);
        if (lane == 0) m.column_sums[col] = of_column;
        if (is_r && col == t) m.d_beta[t] = dots[j];
        if (is_r && col < t) {
          const float d_a = -beta * decay * dots[j];
          weights[col] = d_a;
          m.a[col * kDeltaStride + t] = d_a;
        }
        if (!is_r && col <= t) weights[col] = decay * dots[j];
      }
      of_row += __shfl_xor_sync(~0u, of_row, kWarp / 2);
      if (!is_r) m.row_sums[warp * kDeltaRows + t] = of_row;
    };
    // Below d_o lies d_r. A lane has the rows of d_r if the one 16 before it has those of d_o.
    delta_dots<2 * kDeltaRows>(m.d_o, m.ld, m.u, m.ld, m.V, weigh);
  }

  // The rest of d_c but for the ends of sums; d_o and d_r scaled.
  __device__ void rows_backward() const {
    const DeltaRow row;
    const float from_start = m.from_start[row.t], beta = m.beta[row.t];
    const int at = row.t * m.ld;
    float with_ks = 0, at_end = 0;
    for (int i = at + row.lane; i < at + m.V; i += DeltaRow::kLanes) {
      const float d_r_i = d_r()[i];
      with_ks = fmaf(d_r_i, m.s_kq[i], with_ks);
      scaled_d_r()[i] = -beta * from_start * d_r_i;  // where exp(c_t) S k was
      scaled_d_o()[i] = from_start * m.d_o[i];
    }
    for (int i = at + row.lane; i < at + m.K; i += DeltaRow::kLanes) {
      at_end = fmaf(m.kq[i], m.d_k[i], at_end);  // = exp(c_Q - c_t) u_t . Z k_t
    }
    with_ks = DeltaRow::sum(with_ks);
    at_end = DeltaRow::sum(at_end);
    if (row.lane == 0) {
      m.d_c[row.t] -= fmaf(beta, with_ks, at_end);
      m.at_end[row.t] = at_end;
    }
  }

  // d_q, d_k, and Z before the chunk. Returns this thread's part of the product of Z and the state.
  __device__ float state_backward(const float* S, int ldS, float* Z) const {
    const float left = m.from_start[kDeltaRows - 1];
    float along = 0;
    DeltaTurn turn;
    // d_k, and below it d_q, as what they are made of.
    turn.tiles(2 * kDeltaRows, m.K, [&](WalkTile& tile) {
      tile.add(scaled_d_r(), m.ld, S, ldS, m.V);
      tile.add(m.a, kDeltaStride, m.kq, m.ld, kDeltaRows);
      if (tile.row0 < kDeltaRows) {
        tile.add_transposed(m.p, kDeltaStride, m.q(), m.ld, kDeltaRows);
        tile.add_scaled(1, m.d_k, m.ld);
      }
      tile.store(m.d_k, m.ld);
    });
    if (first == 0) return 0;  // the state is zero, and nothing comes before it
    turn.tiles(m.V, m.K, [&](WalkTile& tile) {
      tile.each([&](float, int row, int col) {
        along = fmaf(Z[row * m.K + col], S[row * ldS + col], along);
      });
      tile.add_transposed(scaled_d_r(), m.ld, m.kq, m.ld, 2 * kDeltaRows);
      tile.add_scaled(left, Z, m.K);
      tile.store(Z, m.K);
    });
    return left * along;
  }

  // k and q before they were normed.
  __device__ void unit_backward() const {
    const DeltaRow row;
    const int K = static_cast<int>(s.K);
    const bool present = row.t < tokens;
    T* const out = args.d_proj.at(sequence, first + (present ? row.t : 0)) + h * s.K;
#pragma unroll 1
    for (int at = row.t; at < 2 * kDeltaRows; at += kDeltaRows) {
      const bool is_q = at >= kDeltaRows;
      const float *unit = m.kq + at * m.ld, *d_unit = m.d_k + at * m.ld;
      // q is 1 / sqrt(K) times a unit vector.
      const float square = is_q ? static_cast<float>(K) : 1.0f, scale = m.rstd[at] / sqrtf(square);
      float along = 0;
      for (int i = row.lane; i < K; i += DeltaRow::kLanes) along = fmaf(unit[i], d_unit[i], along);
      along = DeltaRow::sum(along) * square;
      T* const to = out + (is_q ? s.q() : s.k());
      for (int i = row.lane; present && i < K; i += DeltaRow::kLanes) {
        to[i] = from_float<T>(scale * fmaf(-along, unit[i], d_unit[i]));
      }
    }
  }

  // b and a, by the first warp, a lane a token; at_state is what the state before the chunk gives
  // to the gradient of c at its end.
  __device__ void decays_backward(float at_state, float& d_A_log, float& d_dt_bias) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const bool is_token = lane < tokens;
    const float end = warp_sum(lane < kDeltaRows ? m.at_end[lane] : 0.0f) + at_state;
    float d_log_alpha = 0;
    if (is_token) {
      for (int warp = 0; warp < kDeltaWarps; ++warp) {
        d_log_alpha += m.row_sums[warp * kDeltaRows + lane];
      }
      d_log_alpha += m.d_c[lane] - m.column_sums[lane];
    }
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
    d_row[s.b() + h] = from_float<T>(m.d_beta[lane] * sigmoid(-to_float(row[s.b() + h])));
    d_A_log = fmaf(d_log_alpha, m.g[lane], d_A_log);
    d_dt_bias += d_a;
  }
};

template <bool kShared, int kK, int kV, typename T>
__global__ void __launch_bounds__(kDeltaThreads, kK > 0 ? 4 : 3) scan_backward(Backward<T> args) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  __shared__ float along_state[kDeltaWarps];
  const DeltaShape s = known_delta_shape<kK, kV>(args.s);
  const DeltaSpace m(s, true, kShared,
                     delta_base<kShared>(shared, args.scratch, args.scratch_floats));
  const int thread = static_cast<int>(threadIdx.x), fours = m.V * m.K / 4;
  const int64_t chunks_max = (args.T_max + args.chunk - 1) / args.chunk;
  float* const states = args.matrices + blockIdx.x * (chunks_max + 1) * m.V * m.K;
  float* const Z = states + chunks_max * m.V * m.K;
  const auto state_at = [&](int chunk) { return states + int64_t{chunk} * m.V * m.K; };
  // Where products read a state or Z, and how far its rows are apart.
  const int ldS = kShared ? m.ld : m.K;
  const auto place_of = [&](const float* matrix) { return kShared ? m.state : matrix; };
  // Has it on its way there, until arrived().
  const auto recall = [&](const float* matrix) {
    if constexpr (kShared) {
      for (int i = thread; i < fours; i += kDeltaThreads) {
        const int row = i / (m.K / 4), col = i % (m.K / 4) * 4;
        copy_async(shared_address(m.state + row * m.ld + col), matrix + i * 4, 16);
      }
      commit_copies();
    }
  };
  const auto arrived = [&] {
    if constexpr (kShared) wait_copies<0>();
    __syncthreads();
  };

  for (int i = thread; i < m.V; i += kDeltaThreads) m.norm[i] = i < s.V ? args.w.norm[i] : 0.0f;
  for (int64_t task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    const int h = static_cast<int>(task % s.H);
    const DeltaSequence sequence(args.cu_seqlens, task / s.H, args.T_max);
    const int chunks = (sequence.tokens + args.chunk - 1) / args.chunk;
    __syncthreads();  // the task before is over
    for (int i = thread; i < fours; i += kDeltaThreads) {
      const float4 zero = make_float4(0, 0, 0, 0);
      reinterpret_cast<float4*>(Z)[i] = zero;
      if (chunks > 0) reinterpret_cast<float4*>(states)[i] = zero;
    }
    if (kShared) m.begin_state(s, nullptr);
    for (int i = thread; i < kDeltaWarps * m.V; i += kDeltaThreads) m.d_norm[i] = 0;
    __syncthreads();

    for (int chunk = 0; chunk + 1 < chunks; ++chunk) {
      m.template load_chunk<false>(s, args.w, args.proj, sequence, chunk * args.chunk, args.chunk,
                                   h);
      __syncthreads();
      m.template weights<false>(place_of(state_at(chunk)), ldS);
      __syncthreads();
      m.template solve<false>(
          [&](int i, int col, float u) { m.v[i * m.ld + col] = m.to_end[i] * u; }, nullptr);
      __syncthreads();
      m.advance_state(place_of(state_at(chunk)), ldS, [&](const WalkTile& tile) {
        if (kShared) tile.store(m.state, m.ld);
        tile.store(state_at(chunk + 1), m.K);
      });
      __syncthreads();
    }

    float d_A_log = 0, d_dt_bias = 0;  // of the first warp's lanes
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      const int first = chunk * args.chunk, tokens = min(args.chunk, sequence.tokens - first);
      const BackwardChunk<T> back{args, s, m, sequence, first, tokens, h};
      const float* const S = place_of(state_at(chunk));
      m.template load_chunk<true>(s, args.w, args.proj, sequence, first, tokens, h);
      arrived();
      m.template weights<true>(S, ldS);
      __syncthreads();
      recall(Z);
      m.template solve<true>([&](int i, int col, float u) { m.u[i * m.ld + col] = u; }, m.d_o);
      __syncthreads();
      back.gate_backward();
      arrived();
      back.from_state_after(place_of(Z), ldS);
      __syncthreads();
      recall(state_at(chunk));
      back.solve_back();
      __syncthreads();
      back.weights_backward();
      back.rows_backward();
      arrived();
      const float along = warp_sum(back.state_backward(S, ldS, Z));
      if (thread % kWarp == 0) along_state[thread / kWarp] = along;
      __syncthreads();
      if (chunk > 0) recall(state_at(chunk - 1));
      back.unit_backward();
      if (thread < kWarp) {
        float at_state = 0;
        for (int warp = 0; warp < kDeltaWarps; ++warp) at_state += along_state[warp];
        back.decays_backward(at_state, d_A_log, d_dt_bias);
      }
      __syncthreads();
    }

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
  const bool fits = delta_fits(ctx, DeltaSpace(s, true, true, nullptr).floats);
  const DeltaSpace space(s, true, fits, nullptr);
  const int64_t matrices = ((T_max + chunk - 1) / chunk + 1) * space.V * space.K;
  const int64_t blocks = delta_scan_blocks(tasks, matrices + (fits ? 0 : space.floats));

  ScratchScope scope(ctx.scratch);
  DeltaWeights partial;
  partial.A_log = scope.take<float>(tasks).data();
  partial.dt_bias = scope.take<float>(tasks).data();
  partial.norm = scope.take<float>(tasks * s.V).data();
  float* const kept = scope.take<float>(blocks * matrices).data();
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
                               .matrices = kept,
                               .scratch = scratch,
                               .scratch_floats = space.floats};
    visit_delta(s, fits, [&]<bool kShared, int kK, int kV>() {
      launch(ctx, kOp, scan_backward<kShared, kK, kV, T>,
             {.blocks = {static_cast<unsigned>(blocks)},
              .threads = {kDeltaThreads},
              .shared_bytes = fits ? static_cast<size_t>(space.floats) * sizeof(float) : 0},
             backward);
    });
  });
  const DeltaWeights totals(args.d_params);
  add_rows_to(ctx, kOp, partial.A_log, sequences, s.H, totals.A_log);
  add_rows_to(ctx, kOp, partial.dt_bias, sequences, s.H, totals.dt_bias);
  add_rows_to(ctx, kOp, partial.norm, tasks, s.V, totals.norm);
}

}  // namespace mamba3::cuda
