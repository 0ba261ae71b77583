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
// that in the end each lane has one y_rp, or two of one row; and applies D, norm and gate, and adds
// over the ranks.
//
// With few sequences a head is split over kSplit blocks, so that all multiprocessors have work.
// All of these read the old key and angles, so the one that overwrites them first waits for the
// others: they form a cluster.

#include "cuda/mixer.cuh"
#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"

namespace mamba3::cuda {

// Each lane has n sums to be added over kLanes neighbouring lanes, of which lane i gets the m from
// number i n / kLanes on. Two lanes that exchange add a half of their sums each.
template <int kLanes, int n, int m>
__device__ void sums_over_lanes(const float (&sums)[n], float (&out)[m]) {
  static_assert(kLanes <= kWarp && m == (n > kLanes ? n / kLanes : 1));
  constexpr int kStep = kLanes / 2;
  if constexpr (kLanes == 1) {
#pragma unroll
    for (int i = 0; i < m; ++i) out[i] = sums[i];
  } else if constexpr (n == 1) {
    const float both[1] = {sums[0] + __shfl_xor_sync(~0u, sums[0], kStep)};
    sums_over_lanes<kStep>(both, out);
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
    sums_over_lanes<kStep>(both, out);
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
  constexpr int kEach = 16 / sizeof(S);                  // columns of the state that a lane has
  constexpr int kLanes = kN / kEach;                     // that share a row
  constexpr int kBlockRows = kP / kSplit;                // rows of the block
  constexpr int kRows = kBlockRows * kLanes / kThreads;  // rows of a group of lanes
  constexpr int kOuts = kRows * kR > kLanes ? kRows * kR / kLanes : 1;      // y_rp of a lane
  constexpr int kCopies = kRows * kR < kLanes ? kLanes / (kRows * kR) : 1;  // lanes of a y_rp
  constexpr int kColumns = kN / kWarp;                    // of a row of B or C that a lane has
  constexpr int kItems = (2 * kR + kWarps - 1) / kWarps;  // such rows of a warp
  constexpr int kWeights = (kR * kBlockRows + kThreads - 1) / kThreads;  // of a thread
  static_assert(kRows % 2 == 0 && kR % kOuts == 0 && kColumns == 4);
  static_assert(kN / 2 <= kThreads && kR * kN / 4 <= kThreads && kBlockRows <= kThreads);

  // Column n is at spot(n), so that lanes which read four of theirs at a time read neighbours.
  alignas(16) __shared__ float keys[kR][kN], queries[kR][kN], prev_keys[kR][kN];
  const auto spot = [](int n) { return n % kEach / 4 * (4 * kLanes) + n / kEach * 4 + n % 4; };
  alignas(16) __shared__ float2 weights[kR][kBlockRows];  // of k_r and k_prev_r in row p
  __shared__ float2 turns[kN / 2];                        // cosine and sine of the angles
  __shared__ float outs[kR][kP];                          // y_rp, for the norm

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
  // Of the first y_rp that this lane will have.
  const int of_lane = lane / kCopies * kOuts, r_y = of_lane % kR;
  const int p_y = group * kRows + of_lane / kR;

  // What comes from memory is asked for before anything is waited for, or used: without branches
  // and conversions in between. First what does not hang on the row of the pool.
  let_next_kernel_start();
  const int64_t row = state.rows[b];
  Pack<float, kColumns> norms[kItems], biases[kItems];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = min(warp + item * kWarps, 2 * kR - 1), n = in_warp * kColumns;
    const float* const norm = i < kR ? w.B_norm : w.C_norm;
    const float* const bias = i < kR ? w.B_bias : w.C_bias;
    norms[item] = *reinterpret_cast<const Pack<float, kColumns>*>(norm + n);
    biases[item] =
        *reinterpret_cast<const Pack<float, kColumns>*>(bias + (h * kR + i % kR) * kN + n);
  }
  const float dt_bias = w.dt_bias[h];
  float up[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int i = min(thread + j * kThreads, kR * kBlockRows - 1);
    up[j] = w.mimo_x ? w.mimo_x[(h * kR + i / kBlockRows) * kP + p0 + i % kBlockRows] : 1.0f;
  }
  const int64_t head = row * H + h;
  S* const ssm = state.ssm + (head * kP + p0) * kN;
  if constexpr (kSplit > 1) {  // little else is being read
    constexpr int kLine = 128 / sizeof(S);
    for (int i = thread * kLine; i < kBlockRows * kN; i += kThreads * kLine) prefetch_line(ssm + i);
  }
  wait_for_earlier_kernels();

  // The state.
  using Vector = Pack<S, kEach>;
  S* const mine = ssm + group * kRows * kN + lane * kEach;
  uint4 packed[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) packed[u] = load_once(mine + u * kN);
  const bool has_key = thread < kR * kN / 4;  // four channels of an old key
  const int r_key = has_key ? thread / (kN / 4) : 0, n_key = thread % (kN / 4) * 4;
  float4* const k_prev =
      reinterpret_cast<float4*>(state.k_prev + ((row * kR + r_key) * H + h) * kN + n_key);
  const float4 old_key = *k_prev;
  float* const v_prev = state.v_prev + head * kP + p0;
  const bool has_angle = backwards < angles;
  float* const angle = state.angle + head * angles + backwards;
  const float old_angle = *(has_angle ? angle : v_prev);

  proj += b * proj_stride;
  const T raw_dt = proj[at_dt + h], raw_A = proj[at_dt + H + h], raw_trap = proj[at_dt + 2 * H + h];
  const T raw_angle = proj[has_angle ? at_dt + 3 * H + backwards : 0];
  Pack<T, kColumns> raw_items[kItems];  // a warp's rows of B, then of C
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = min(warp + item * kWarps, 2 * kR - 1);
    raw_items[item] = *reinterpret_cast<const Pack<T, kColumns>*>(
        proj + (i < kR ? at_B : at_C) + (i % kR * G + g) * kN + in_warp * kColumns);
  }
  const T* const x = proj + at_x + h * kP + p0;
  T raw_x[kWeights];
  float v_prev_p[kWeights];
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int p = (thread + j * kThreads) % kBlockRows;
    raw_x[j] = x[p], v_prev_p[j] = v_prev[p];
  }

  const float dt = softplus(to_float(raw_dt) + dt_bias);
  const float lam = sigmoid(to_float(raw_trap));
  const float a = expf(-fmaxf(decay_act(s.decay_act, to_float(raw_A)), s.A_floor) * dt);
  float phi = 0;
  if (has_angle) {
    phi = reduced_angle(fmaf(kPi * tanhf(to_float(raw_angle)), dt, old_angle));
    sincosf(phi, &turns[backwards].y, &turns[backwards].x);
  }
#pragma unroll
  for (int j = 0; j < kWeights; ++j) {
    const int i = thread + j * kThreads;
    if (i >= kR * kBlockRows) break;
    const int r = i / kBlockRows, p = i % kBlockRows;
    weights[r][p] = {lam * dt * to_float(raw_x[j]) * up[j],
                     (1 - lam) * dt * a * v_prev_p[j] * up[j]};
  }
  float items[kItems][kColumns];
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps;
    if (i >= 2 * kR) break;
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      items[item][j] = to_float(raw_items[item].at[j]);
      sum = fmaf(items[item][j], items[item][j], sum);
    }
    const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(kN) + s.eps);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      items[item][j] = fmaf(items[item][j] * rstd, norms[item].at[j], biases[item].at[j]);
    }
  }
  if (has_key) *reinterpret_cast<float4*>(&prev_keys[r_key][spot(n_key)]) = old_key;
  __syncthreads();  // the old state but ssm is read, the angles are known
  if constexpr (kSplit > 1) arrive_at_cluster_barrier();

  // For the end; registers are scarce until here.
  float up_x[kOuts], up_z[kOuts], down[kOuts];
#pragma unroll
  for (int o = 0; o < kOuts; ++o) {
    const int i = (h * kR + r_y + o) * kP + p0 + p_y;
    up_x[o] = w.mimo_x ? w.mimo_x[i] : 1.0f;
    up_z[o] = w.mimo_z ? w.mimo_z[i] : 1.0f;
    down[o] = w.mimo_o ? w.mimo_o[i] : 1.0f;
  }
  const float D = w.D[h];
  const T raw_z = proj[h * kP + p0 + p_y], raw_x_y = x[p_y];

#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const int i = warp + item * kWarps;
    if (i >= 2 * kR) break;
    const int n = in_warp * kColumns;
    float* const to = (i < kR ? keys[i % kR] : queries[i % kR]) + spot(n);
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
  if (thread < kBlockRows) v_prev[thread] = to_float(raw_x[0]);
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
      const int at = i * kLanes + lane * 4;
      *reinterpret_cast<float4*>(k + i) = *reinterpret_cast<float4*>(&keys[r][at]);
      *reinterpret_cast<float4*>(before + i) = *reinterpret_cast<float4*>(&prev_keys[r][at]);
    }
#pragma unroll
    for (int u = 0; u < kRows; u += 2) {
      const float4 both = *reinterpret_cast<float4*>(&weights[r][group * kRows + u]);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        values[u][i] = fmaf(both.x, k[i], fmaf(both.y, before[i], values[u][i]));
        values[u + 1][i] = fmaf(both.z, k[i], fmaf(both.w, before[i], values[u + 1][i]));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kEach; ++i) vector.at[i] = from_float<S>(values[u][i]);
    __stcs(reinterpret_cast<uint4*>(mine + u * kN), *reinterpret_cast<const uint4*>(&vector));
  }
  float sums[kRows * kR];
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    float q[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i += 4) {
      *reinterpret_cast<float4*>(q + i) =
          *reinterpret_cast<float4*>(&queries[r][i * kLanes + lane * 4]);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum = fmaf(values[u][i], q[i], sum);
      sums[u * kR + r] = sum;
    }
  }
  float outs_of_lane[kOuts];
  sums_over_lanes<kLanes>(sums, outs_of_lane);
#pragma unroll
  for (int o = 0; o < kOuts; ++o)
    outs_of_lane[o] = fmaf(D * to_float(raw_x_y), up_x[o], outs_of_lane[o]);
  if (kSplit == 1 && w.norm) {
    if (lane % kCopies == 0) {
#pragma unroll
      for (int o = 0; o < kOuts; ++o) outs[r_y + o][p_y] = outs_of_lane[o];
    }
    __syncthreads();
    const float norm = w.norm[h * kP + p_y];
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      float sum = 0;
#pragma unroll
      for (int p = in_warp; p < kP; p += kWarp) sum = fmaf(outs[r][p], outs[r][p], sum);
      const float rstd = rsqrtf(warp_sum(sum) / static_cast<float>(kP) + s.eps);
#pragma unroll
      for (int o = 0; o < kOuts; ++o) {
        if (r == r_y + o) outs_of_lane[o] *= rstd * norm;
      }
    }
  }
  const float z = to_float(raw_z);
  float y = 0;
#pragma unroll
  for (int o = 0; o < kOuts; ++o) y = fmaf(outs_of_lane[o], silu(z * up_z[o]) * down[o], y);
#pragma unroll
  for (int r = kOuts; r < kR; r *= 2) y += __shfl_xor_sync(~0u, y, r / kOuts * kCopies);
  if (lane % (kCopies * kR / kOuts) == 0) {
    y_out[b * y_stride + h * kP + p0 + p_y] = from_float<T>(y);
  }

  if constexpr (kSplit > 1) wait_at_cluster_barrier();
  if (part > 0) return;
  if (has_angle) *angle = phi;
  if (has_key) *k_prev = *reinterpret_cast<const float4*>(&keys[r_key][spot(n_key)]);
}

}  // namespace mamba3::cuda
