#pragma once

// What the backwards of the Mamba-3 scan in f32 share: the gate, step sizes and the sums of the
// gradients of parameters.

#include "cuda/column_sums.cuh"
#include "cuda/mixer_segment.cuh"

namespace mamba3::cuda {

// Gradients of the parameters, one after the other: where each begins.
struct ParamOffsets {
  int64_t dt_bias, D, A_log, B_bias, C_bias, mimo_x, mimo_z, mimo_o, norm, B_norm, C_norm, end;

  explicit ParamOffsets(const MixerShape& s)
      : dt_bias(0),
        D(s.H),
        A_log(D + s.H),
        B_bias(A_log + (s.has_dd_A() ? 0 : s.H)),
        C_bias(B_bias + (s.bc_bias ? s.H * s.R * s.N : 0)),
        mimo_x(C_bias + (s.bc_bias ? s.H * s.R * s.N : 0)),
        mimo_z(mimo_x + (s.mimo ? s.H * s.R * s.P : 0)),
        mimo_o(mimo_z + (s.mimo ? s.H * s.R * s.P : 0)),
        norm(mimo_o + (s.mimo ? s.H * s.R * s.P : 0)),
        B_norm(norm + (s.out_norm ? s.H * s.P : 0)),
        C_norm(B_norm + (s.bc_norm ? s.N : 0)),
        end(C_norm + (s.bc_norm ? s.N : 0)) {}
};

// What stands between z, y of a row and its part of the output.
struct Gate {
  float normed, weighted, z_r, silu, d_silu, d_gated;
};
__device__ inline Gate gate_of(const MixerShape& s, const MixerWeights& w, int h, int r, int p,
                               float y, float rstd, float z, float d_out) {
  const int P = static_cast<int>(s.P);
  const int64_t i = (h * s.R + r) * P + p;
  Gate gate;
  gate.normed = y * rstd;
  gate.weighted = w.norm ? gate.normed * w.norm[h * P + p] : gate.normed;
  gate.z_r = w.mimo_z ? z * w.mimo_z[i] : z;
  const float sig = sigmoid(gate.z_r);
  gate.silu = gate.z_r * sig;
  gate.d_silu = sig * fmaf(gate.z_r, 1 - sig, 1.0f);
  gate.d_gated = w.mimo_o ? d_out * w.mimo_o[i] : d_out;
  return gate;
}

// dd_dt and trap of a token, from the gradients of gamma (with that of scale), of carry, and the
// rest of that of dt. Returns that of dt_bias.
template <typename T>
__device__ float step_backward(const MixerShape& s, const MixerWeights& w, const T* row, T* d_row,
                               int h, float d_gamma, float d_carry, float d_rest) {
  const float raw = to_float(row[s.dd_dt() + h]) + w.dt_bias[h];
  const float lam = trapezoid(s, row, h);
  const float d_dt = fmaf(lam, d_gamma, fmaf(1 - lam, d_carry, d_rest));
  const float d_raw = d_dt * sigmoid(raw);
  d_row[s.dd_dt() + h] = from_float<T>(d_raw);
  if (s.has_trap()) {
    d_row[s.trap() + h] = from_float<T>(softplus(raw) * (d_gamma - d_carry) * lam * (1 - lam));
  }
  return d_raw;
}

// A head that began from S + carry sum_r v_prev_r k_prev_r^T has `d` (P,N), the gradient of that.
struct CarryGradients {
  const float *k_prev, *v_prev;  // (R,N), ranks H N apart; (P)
  float *d_k_prev, *d_v_prev;    // the same, written; or null
  float* d_mimo_x;               // (R,P), added to; or null

  // Returns the gradient of carry, to all threads of the block; `sums` is shared, for each warp.
  __device__ float run(const MixerShape& s, const MixerWeights& w, int h, const float* d,
                       float carry, float* sums) const {
    const int P = static_cast<int>(s.P), N = static_cast<int>(s.N), R = static_cast<int>(s.R);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int64_t apart = s.H * s.N;  // ranks of keys
    const auto up = [&](int r, int p) { return w.mimo_x ? w.mimo_x[(h * R + r) * P + p] : 1.0f; };
    float d_carry = 0;
    for (int i = thread; i < R * N; i += threads) {
      const int r = i / N, n = i % N;
      float sum = 0;
      for (int p = 0; p < P; ++p) sum = fmaf(d[p * N + n], v_prev[p] * up(r, p), sum);
      d_carry = fmaf(sum, k_prev[r * apart + n], d_carry);
      if (d_k_prev) d_k_prev[r * apart + n] = carry * sum;
    }
    for (int p = thread / kWarp; p < P; p += threads / kWarp) {
      float d_v = 0;
      for (int r = 0; r < R; ++r) {
        float sum = 0;
        for (int n = thread % kWarp; n < N; n += kWarp) {
          sum = fmaf(d[p * N + n], k_prev[r * apart + n], sum);
        }
        sum = carry * warp_sum(sum);
        d_v = fmaf(sum, up(r, p), d_v);
        if (thread % kWarp == 0 && d_mimo_x) d_mimo_x[r * P + p] += sum * v_prev[p];
      }
      if (thread % kWarp == 0 && d_v_prev) d_v_prev[p] = d_v;
    }
    return block_sum(d_carry, sums);
  }
};

// totals += the sum over the rows of `partial` (rows, end - begin): gradients of the parameters
// from offset `begin` to `end`. A block has kSumColumns of them, whose rows of threads take the
// rows in turns. With `chunks` a row is that of a chunk, and absent chunks, which are the last
// ones, have none.
__global__ static void add_param_rows(const float* partial, int64_t rows, const MixerChunk* chunks,
                                      ParamOffsets o, int64_t begin, int64_t end,
                                      MixerWeights totals) {
  __shared__ float sums[kSumRows][kSumColumns];
  const int64_t columns = end - begin;
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  float sum = 0;
  for (int64_t row = threadIdx.y; column < columns && row < rows; row += kSumRows) {
    if (chunks && chunks[row].tokens == 0) break;
    sum += partial[row * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int i = 1; i < kSumRows; ++i) sum += sums[i][threadIdx.x];
  float* const to[] = {totals.dt_bias, totals.D,      totals.A_log,  totals.B_bias,
                       totals.C_bias,  totals.mimo_x, totals.mimo_z, totals.mimo_o,
                       totals.norm,    totals.B_norm, totals.C_norm};
  const int64_t begins[] = {o.dt_bias, o.D,      o.A_log, o.B_bias, o.C_bias, o.mimo_x,
                            o.mimo_z,  o.mimo_o, o.norm,  o.B_norm, o.C_norm, o.end};
  const int64_t index = begin + column;
#pragma unroll
  for (int i = 0; i < 11; ++i) {
    if (index >= begins[i] && index < begins[i + 1]) to[i][index - begins[i]] += sum;
  }
}

inline void add_params(Context& ctx, const char* op, const float* partial, int64_t rows,
                       const MixerChunk* chunks, const ParamOffsets& offsets, int64_t begin,
                       int64_t end, const MixerWeights& totals) {
  launch(ctx, op, add_param_rows,
         {.blocks = {blocks_for(end - begin, kSumColumns)}, .threads = {kSumColumns, kSumRows}},
         partial, rows, chunks, offsets, begin, end, totals);
}

}  // namespace mamba3::cuda
