#pragma once

// One token of every sequence for sizes that are known when compiling.
//
// The schedule. A block takes all rows p of the state (P,N) of a head, or with kSplit > 1 some of
// them. It asks for its part of the state first, 16 bytes a load and all of it at once, into
// registers. While that is on its way,
//   1. some threads advance the angles, one each; every warp takes rows of B and C and norms them;
//      the threads find the weights of k_r and k_prev_r in each row p;
//   2. the warps rotate their rows to keys and queries in shared memory.
// Then every group of kLanes lanes, which has kRows rows of the state,
//   S_p = a S_p + sum_r before_rp k_prev_r + now_rp k_r,   y_rp = S_p . q_r
// writes them back, and adds up y over its lanes, halving what a lane has with each exchange, so
// that in the end each lane has one y_rp, applies D, norm and gate, and adds over the ranks.
//
// With few sequences a head is split over kSplit blocks, so that all multiprocessors have work.
// All of these read the old key and angles, so the one that overwrites them first waits for the
// others: they form a cluster.

#include "cuda/mixer.cuh"
#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"

namespace mamba3::cuda {

// Each lane has n sums to be added over kLanes neighbouring lanes, of which lane i gets number
// i n / kLanes. Two lanes that exchange add a half of their sums each.
template <int kLanes, int n>
__device__ float sums_over_lanes(const float (&sums)[n]) {
  static_assert(n <= kLanes && kLanes <= kWarp);
  constexpr int kStep = kLanes / 2;
  if constexpr (kLanes == 1) {
    return sums[0];
  } else if constexpr (n == 1) {
    const float both[1] = {sums[0] + __shfl_xor_sync(~0u, sums[0], kStep)};
    return sums_over_lanes<kStep>(both);
  } else {
    const bool upper = (threadIdx.x & kStep) != 0;
    float both[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      // The values, not their places, are chosen: an array that a lane indexes is not in registers.
      const float below = sums[i], above = sums[i + n / 2];
      const float given = __shfl_xor_sync(~0u, upper ? below : above, kStep);
      both[i] = (upper ? above : below) + given;
    }
    return sums_over_lanes<kStep>(both);
  }
}

// What a block is made of. kBlocks: how many of them a multiprocessor should hold at least, which
// bounds the registers.
template <int warps, int split, int blocks>
struct StepTile {
  static constexpr int kWarps = warps, kSplit = split, kBlocks = blocks;
};

// T: proj and y; S: the state.
template <typename T, typename S, int kN, int kP, int kR, typename Tile>
__global__ void __launch_bounds__(Tile::kWarps* kWarp, Tile::kBlocks)
    step_known_head(MixerShape s, MixerWeights w, const T* proj, int64_t proj_stride, T* y_out,
                    int64_t y_stride, MixerPool<S> state) {
  constexpr int kWarps = Tile::kWarps, kThreads = kWarps * kWarp, kSplit = Tile::kSplit;
  constexpr int kEach = 16 / sizeof(S);                   // columns of the state that a lane has
  constexpr int kLanes = kN / kEach;                      // that share a row
  constexpr int kBlockRows = kP / kSplit;                 // rows of the block
  constexpr int kRows = kBlockRows * kLanes / kThreads;   // rows of a group of lanes
  constexpr int kCopies = kLanes / (kRows * kR);          // lanes that end with the same y_rp
  constexpr int kColumns = kN / kWarp;                    // of a row of B or C that a lane has
  constexpr int kItems = (2 * kR + kWarps - 1) / kWarps;  // such rows of a warp
  constexpr int kWeights = (kR * kBlockRows + kThreads - 1) / kThreads;  // of a thread
  static_assert(kRows > 0 && kCopies > 0 && kColumns % 2 == 0);
  static_assert(kN / 2 <= kThreads && kR * kN / 4 <= kThreads && kBlockRows <= kThreads);

  alignas(16) __shared__ float keys[kR][kN], queries[kR][kN], prev_keys[kR][kN];
  __shared__ float2 weights[kR][kBlockRows];  // of k_r and k_prev_r in row p
  __shared__ float2 turns[kN / 2];            // cosine and sine of the angles
  __shared__ float outs[kR][kP];              // y_rp, for the norm

  // Blocks along x are the heads of a group, along z the groups.
  const int H = static_cast<int>(s.H), G = static_cast<int>(s.G), angles = static_cast<int>(s.S);
  const int part = static_cast<int>(blockIdx.x) % kSplit, g = static_cast<int>(blockIdx.z);
  const int h = g * (static_cast<int>(gridDim.x) / kSplit) + static_cast<int>(blockIdx.x) / kSplit;
  const int64_t b = blockIdx.y;
  // As those of MixerShape, in the integers that are fast: a row of the projection has fewer than
  // 2^31 elements.
  const int at_x = H * kP, at_B = 2 * H * kP, at_C = at_B + kR * G * kN, at_dt = at_C + kR * G * kN;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, in_warp = thread % kWarp;
  const int lane = thread % kLanes, group = thread / kLanes;
  const int p0 = part * kBlockRows;
  // Threads from the last one back take what the first warps, which have B and C, need not.
  const int backwards = kThreads - 1 - thread;
  // Of the y_rp that this lane will have.
  const int of_lane = lane / kCopies, r_y = of_lane % kR, p_y = group * kRows + of_lane / kR;

  // All that comes from memory is asked for before anything is waited for, first what does not hang
  // on the row of the pool.
  let_next_kernel_start();
  const int64_t row = state.rows[b];
  float norms[kItems][kColumns], biases[kItems][kColumns];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps, n = in_warp * kColumns;
    if (i >= 2 * kR) break;
    load((i < kR ? w.B_norm : w.C_norm) + n, norms[item]);
    load((i < kR ? w.B_bias : w.C_bias) + (h * kR + i % kR) * kN + n, biases[item]);
  }
  const float dt_bias = w.dt_bias[h], D = w.D[h];
  const int mimo_y = (h * kR + r_y) * kP + p0 + p_y;
  const float up_x = w.mimo_x ? w.mimo_x[mimo_y] : 1.0f, up_z = w.mimo_z ? w.mimo_z[mimo_y] : 1.0f;
  const float down = w.mimo_o ? w.mimo_o[mimo_y] : 1.0f;
  float up[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int i = min(thread + j * kThreads, kR * kBlockRows - 1);
    up[j] = w.mimo_x ? w.mimo_x[(h * kR + i / kBlockRows) * kP + p0 + i % kBlockRows] : 1.0f;
  }
  wait_for_earlier_kernels();
  proj += b * proj_stride;
  const float raw_dt = to_float(proj[at_dt + h]) + dt_bias;
  const float raw_A = to_float(proj[at_dt + H + h]);
  const float raw_trap = to_float(proj[at_dt + 2 * H + h]);
  float items[kItems][kColumns];  // a warp's rows of B, then of C
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps;
    if (i >= 2 * kR) break;
    const T* raw = proj + (i < kR ? at_B : at_C) + (i % kR * G + g) * kN + in_warp * kColumns;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) items[item][j] = to_float(raw[j]);
  }

  // The state.
  using Vector = Pack<S, kEach>;
  S* const ssm = state.ssm + ((row * H + h) * kP + p0 + group * kRows) * kN + lane * kEach;
  uint4 packed[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) packed[u] = __ldcs(reinterpret_cast<const uint4*>(ssm + u * kN));

  float* const angle = state.angle + (row * H + h) * angles + backwards;
  float phi = backwards < angles ? *angle : 0.0f;
  const float raw_angle = backwards < angles ? to_float(proj[at_dt + 3 * H + backwards]) : 0.0f;
  float4* const k_prev = reinterpret_cast<float4*>(state.k_prev) +
                         ((row * kR + thread / (kN / 4)) * H + h) * (kN / 4) + thread % (kN / 4);
  const bool has_key = thread < kR * kN / 4;
  const float4 old_key = has_key ? *k_prev : float4{};
  const T* const x = proj + at_x + h * kP + p0;
  float* const v_prev = state.v_prev + (row * H + h) * kP + p0;
  float x_p[kWeights], v_prev_p[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int p = (thread + j * kThreads) % kBlockRows;
    x_p[j] = to_float(x[p]), v_prev_p[j] = v_prev[p];
  }
  const float z = to_float(proj[h * kP + p0 + p_y]) * up_z;
  const float direct = D * (to_float(x[p_y]) * up_x);

  const float dt = softplus(raw_dt);
  const float lam = sigmoid(raw_trap);
  const float a = expf(-fmaxf(decay_act(s.decay_act, raw_A), s.A_floor) * dt);
  if (backwards < angles) {
    phi = reduced_angle(fmaf(kPi * tanhf(raw_angle), dt, phi));
    sincosf(phi, &turns[backwards].y, &turns[backwards].x);
  }
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int i = thread + j * kThreads;
    if (i >= kR * kBlockRows) break;
    const int r = i / kBlockRows, p = i % kBlockRows;
    weights[r][p] = {lam * dt * x_p[j] * up[j], (1 - lam) * dt * a * v_prev_p[j] * up[j]};
  }
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps;
    if (i >= 2 * kR) break;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sum = fmaf(items[item][j], items[item][j], sum);
    const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(kN) + s.eps);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      items[item][j] = fmaf(items[item][j] * rstd, norms[item][j], biases[item][j]);
    }
  }
  if (has_key) reinterpret_cast<float4*>(prev_keys)[thread] = old_key;
  __syncthreads();  // the old state but ssm is read, the angles are known
  if constexpr (kSplit > 1) arrive_at_cluster_barrier();

#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps;
    if (i >= 2 * kR) break;
    const int n = in_warp * kColumns;
    float* const to = (i < kR ? keys[i % kR] : queries[i % kR]) + n;
    float(&channel)[kColumns] = items[item];
    if (s.rope_pairs == RopePairs::neighbours) {
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        const int pair = (n + j) / 2;
        const float2 turn = pair < angles ? turns[pair] : float2{1, 0};
        const float first = channel[j], second = channel[j + 1];
        channel[j] = first * turn.x - second * turn.y;
        channel[j + 1] = first * turn.y + second * turn.x;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int pair = (n + j) % (kN / 2);
        const float2 turn = pair < angles ? turns[pair] : float2{1, 0};
        const float other = __shfl_xor_sync(~0u, channel[j], kWarp / 2);
        channel[j] = channel[j] * turn.x + (n < kN / 2 ? -other : other) * turn.y;
      }
    }
    store(channel, to);
  }
  if (thread < kBlockRows) v_prev[thread] = x_p[0];
  __syncthreads();

  float values[kRows][kEach];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const Vector vector = *reinterpret_cast<const Vector*>(&packed[u]);
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[u][i] = a * to_float(vector.at[i]);
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float k[kEach], before[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      *reinterpret_cast<float4*>(k + i) = *reinterpret_cast<float4*>(&keys[r][lane * kEach + i]);
      *reinterpret_cast<float4*>(before + i) =
          *reinterpret_cast<float4*>(&prev_keys[r][lane * kEach + i]);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const float2 weight = weights[r][group * kRows + u];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        values[u][i] = fmaf(weight.x, k[i], fmaf(weight.y, before[i], values[u][i]));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kEach; ++i) vector.at[i] = from_float<S>(values[u][i]);
    __stcs(reinterpret_cast<uint4*>(ssm + u * kN), *reinterpret_cast<const uint4*>(&vector));
  }
  float sums[kRows * kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float q[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      *reinterpret_cast<float4*>(q + i) = *reinterpret_cast<float4*>(&queries[r][lane * kEach + i]);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum = fmaf(values[u][i], q[i], sum);
      sums[u * kR + r] = sum;
    }
  }
  float y = sums_over_lanes<kLanes>(sums) + direct;
  if (kSplit == 1 && w.norm) {
    if (lane % kCopies == 0) outs[r_y][p_y] = y;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      float sum = 0;
#pragma unroll
      for (int p = in_warp; p < kP; p += kWarp) sum = fmaf(outs[r][p], outs[r][p], sum);
      const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(kP) + s.eps);
      if (r == r_y) y *= rstd * w.norm[h * kP + p_y];
    }
  }
  y *= silu(z) * down;
#pragma unroll
  for (int r = 1; r < kR; r *= 2) y += __shfl_xor_sync(~0u, y, r * kCopies);
  if (lane % (kCopies * kR) == 0) {
    y_out[b * y_stride + h * kP + p0 + p_y] = from_float<T>(y);
  }

  if constexpr (kSplit > 1) wait_at_cluster_barrier();
  if (part > 0) return;
  if (backwards < angles) *angle = phi;
  if (has_key) *k_prev = reinterpret_cast<const float4*>(keys)[thread];
}

}  // namespace mamba3::cuda
