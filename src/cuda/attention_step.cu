#include <algorithm>
#include <cmath>

#include "cuda/attention.cuh"
#include "ops/attention.h"

// Schedule. All there is to do is to read the cache once, so a block takes a stretch of the keys of
// one key head, with up to kHeads of the query heads that share it, and writes an average over its
// stretch; a second kernel joins the stretches. How many stretches depends on the shape only, and
// how long they are on the length that the device knows, so a captured graph serves every length.
// Within a block, kLanes lanes hold a key, eight dims each, and take every so many-th key of the
// stretch in batches of kBatch, each with its own softmax; the averages are joined in shared
// memory.
//
// The new key and value are read from qkv, not from the cache, by all blocks that need them,
// because another block may be writing them there: the first of those, to which it falls.

namespace mamba3::cuda {

namespace {

constexpr int kStepThreads = 128, kVector = 8, kBatch = 4;
constexpr int kShortestStretch = 64;  // keys
constexpr int kMostStretches = 64;
constexpr int64_t kEnoughBlocks = 512;  // to keep any card busy

struct StepParams {
  Heads q, k, v, y;
  Heads cached_k, cached_v;
  const int32_t *rows = nullptr, *lengths = nullptr;
  int B = 0, Hq = 0, Hkv = 0;
  int stretches = 0;
  float scale = 0;  // of scores, in powers of 2
  // Averages of stretches, (B, Hq, stretches, ...); unused if there is only one.
  float *largest = nullptr, *sum = nullptr, *out = nullptr;  // out: (..., d)
};

__device__ int keys_of_stretch(int keys, int stretches) {
  return max((keys + stretches - 1) / stretches, kShortestStretch);
}

// The dims of a lane: eight neighbours if they can be read as a vector, else every kLanes-th.
template <int kLanes>
__device__ int dim_of(bool vectors, int lane, int i) {
  return vectors ? lane * kVector + i : lane + i * kLanes;
}

template <typename Cached, int kLanes>
__device__ void read_dims(const Cached* row, int d, bool vectors, int lane, float (&out)[kVector]) {
  if (!vectors) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int dim = dim_of<kLanes>(false, lane, i);
      out[i] = dim < d ? to_float(row[dim]) : 0.0f;
    }
    return;
  }
  alignas(16) Cached values[kVector];
  constexpr int kWords = static_cast<int>(sizeof(values) / sizeof(uint4));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    reinterpret_cast<uint4*>(values)[i] =
        lane * kVector < d ? reinterpret_cast<const uint4*>(row + lane * kVector)[i]
                           : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) out[i] = to_float(values[i]);
}

template <typename Cached, int kLanes, int kHeads>
__global__ void __launch_bounds__(kStepThreads) step_kernel(StepParams p) {
  constexpr int kTeams = kStepThreads / kLanes, kWidth = kLanes * kVector;
  __shared__ __align__(16) Cached new_k[kWidth], new_v[kWidth];
  __shared__ float team_largest[kTeams][kHeads], team_sum[kTeams][kHeads];
  __shared__ float team_out[kTeams][kHeads][kWidth];

  const int group = p.Hq / p.Hkv, parts = (group + kHeads - 1) / kHeads;  // of a group
  const int stretch = static_cast<int>(blockIdx.x % p.stretches);
  const int part = static_cast<int>(blockIdx.x / p.stretches % parts);
  const int kv_head = static_cast<int>(blockIdx.x / p.stretches / parts % p.Hkv);
  const int b = static_cast<int>(blockIdx.x / p.stretches / parts / p.Hkv);
  const int h0 = kv_head * group + part * kHeads, heads = min(kHeads, group - part * kHeads);
  const int past = p.lengths[b], keys = past + 1;
  const int length = keys_of_stretch(keys, p.stretches);
  const int begin = stretch * length, end = min(begin + length, keys);
  if (begin >= keys) return;

  const int d = p.q.d, thread = static_cast<int>(threadIdx.x);
  const Rows cached_k = p.cached_k.rows(p.rows[b], 0, kv_head, keys);
  const Rows cached_v = p.cached_v.rows(p.rows[b], 0, kv_head, keys);
  if (end == keys) {  // the new key is ours
    const Rows k = p.k.rows(b, 0, kv_head, 1), v = p.v.rows(b, 0, kv_head, 1);
    for (int i = thread; i < d; i += kStepThreads) {
      new_k[i] = from_float<Cached>(k.at(0, i));
      new_v[i] = from_float<Cached>(v.at(0, i));
      if (part == 0) {
        cached_k.set(past, i, k.at(0, i));
        cached_v.set(past, i, v.at(0, i));
      }
    }
  }
  __syncthreads();
  const auto row_of = [&](const Rows& cached, const Cached* fresh, int key) {
    return key == past ? fresh : static_cast<const Cached*>(cached.data) + key * cached.stride;
  };

  const int lane = thread % kLanes, team = thread / kLanes;
  const bool vectors = cached_k.vectors && cached_v.vectors;
  float q[kHeads][kVector], o[kHeads][kVector] = {}, largest[kHeads], sum[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const Rows row = p.q.rows(b, 0, h0 + min(h, heads - 1), 1);
    largest[h] = -INFINITY;
    sum[h] = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      q[h][i] = row.at(0, dim_of<kLanes>(vectors, lane, i)) * p.scale;
    }
  }

  for (int first = begin; first < end; first += kTeams * kBatch) {
    float s[kBatch][kHeads], row[kVector];
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int key = first + n * kTeams + team;
      read_dims<Cached, kLanes>(row_of(cached_k, new_k, min(key, end - 1)), d, vectors, lane, row);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) dot = fmaf(q[h][i], row[i], dot);
        dot = lanes_sum<kLanes>(dot);
        s[n][h] = key < end ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = largest[h];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) top = fmaxf(top, s[n][h]);
      const float base = top == -INFINITY ? 0.0f : top;  // this team has no key: weights are 0
      const float correction = exp2f(largest[h] - base);
      largest[h] = top;
      sum[h] *= correction;
#pragma unroll
      for (int i = 0; i < kVector; ++i) o[h][i] *= correction;
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        s[n][h] = exp2f(s[n][h] - base);
        sum[h] += s[n][h];
      }
    }
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int key = first + n * kTeams + team;
      read_dims<Cached, kLanes>(row_of(cached_v, new_v, min(key, end - 1)), d, vectors, lane, row);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) o[h][i] = fmaf(s[n][h], row[i], o[h][i]);
      }
    }
  }

#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (lane == 0) {
      team_largest[team][h] = largest[h];
      team_sum[team][h] = sum[h];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) team_out[team][h][dim_of<kLanes>(vectors, lane, i)] = o[h][i];
  }
  __syncthreads();
  for (int i = thread; i < heads * d; i += kStepThreads) {
    const int h = i / d, dim = i % d;
    float top = team_largest[0][h], total = 0.0f, value = 0.0f;  // team 0 has a key
    for (int n = 1; n < kTeams; ++n) top = fmaxf(top, team_largest[n][h]);
    for (int n = 0; n < kTeams; ++n) {
      const float weight = exp2f(team_largest[n][h] - top);
      total = fmaf(weight, team_sum[n][h], total);
      value = fmaf(weight, team_out[n][h][dim], value);
    }
    if (p.stretches == 1) {
      p.y.rows(b, 0, h0 + h, 1).set(0, dim, value / total);
    } else {
      const int64_t at = (static_cast<int64_t>(b) * p.Hq + h0 + h) * p.stretches + stretch;
      p.out[at * d + dim] = value;
      if (dim == 0) {
        p.largest[at] = top;
        p.sum[at] = total;
      }
    }
  }
}

// A block takes a query head of a sequence.
__global__ void __launch_bounds__(kStepThreads) join_kernel(StepParams p) {
  const int h = static_cast<int>(blockIdx.x) % p.Hq, b = static_cast<int>(blockIdx.x) / p.Hq;
  const int keys = p.lengths[b] + 1, length = keys_of_stretch(keys, p.stretches);
  const int stretches = (keys + length - 1) / length;  // that are not empty
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.stretches;
  const Rows y = p.y.rows(b, 0, h, 1);
  float top = p.largest[at];
  for (int n = 1; n < stretches; ++n) top = fmaxf(top, p.largest[at + n]);
  for (int dim = static_cast<int>(threadIdx.x); dim < y.d; dim += kStepThreads) {
    float total = 0.0f, value = 0.0f;
    for (int n = 0; n < stretches; ++n) {
      const float weight = exp2f(p.largest[at + n] - top);
      total = fmaf(weight, p.sum[at + n], total);
      value = fmaf(weight, p.out[(at + n) * y.d + dim], value);
    }
    y.set(0, dim, value / total);
  }
}

template <int kHeads>
int64_t blocks_without_stretches(const StepParams& p) {
  return static_cast<int64_t>(p.B) * p.Hkv * ((p.Hq / p.Hkv + kHeads - 1) / kHeads);
}

template <typename Cached, int kHeads>
void launch_step(Context& ctx, const StepParams& p) {
  const Grid grid{
      .blocks = dim3(static_cast<unsigned>(blocks_without_stretches<kHeads>(p) * p.stretches)),
      .threads = dim3(kStepThreads)};
  const int d = p.q.d;
  if (d <= 64) return launch(ctx, "attention_step", step_kernel<Cached, 8, kHeads>, grid, p);
  if (d <= 128) return launch(ctx, "attention_step", step_kernel<Cached, 16, kHeads>, grid, p);
  launch(ctx, "attention_step", step_kernel<Cached, 32, kHeads>, grid, p);
}

}  // namespace

void attention_step(Context& ctx, const AttentionArgs& args) {
  constexpr int kGroupHeads = 4;
  const int64_t B = args.qkv.dim(0), T_max = args.cache.k.dim(1), d = args.d;
  StepParams p{
      .q = heads_of(args.qkv, 0, d),
      .k = heads_of(args.qkv, args.Hq, d),
      .v = heads_of(args.qkv, args.Hq + args.Hkv, d),
      .y = heads_of(args.y, 0, d),
      .cached_k = heads_of(args.cache.k, 0, d),
      .cached_v = heads_of(args.cache.v, 0, d),
      .rows = data<const int32_t>(args.cache.rows),
      .lengths = data<const int32_t>(args.cache.lengths),
      .B = static_cast<int>(B),
      .Hq = static_cast<int>(args.Hq),
      .Hkv = static_cast<int>(args.Hkv),
      .scale = kLog2E / std::sqrt(static_cast<float>(d)),
  };
  const bool grouped = args.Hq > args.Hkv;
  const int64_t blocks =
      grouped ? blocks_without_stretches<kGroupHeads>(p) : blocks_without_stretches<1>(p);
  const int64_t wanted = (kEnoughBlocks + blocks - 1) / std::max<int64_t>(blocks, 1);
  const int64_t useful = (T_max + kShortestStretch - 1) / kShortestStretch;
  p.stretches = static_cast<int>(
      std::clamp<int64_t>(std::min(wanted, useful), 1, static_cast<int64_t>(kMostStretches)));

  ScratchScope scope(ctx.scratch);
  if (p.stretches > 1) {
    const int64_t averages = B * args.Hq * p.stretches;
    p.largest = scope.take<float>(averages).data();
    p.sum = scope.take<float>(averages).data();
    p.out = scope.take<float>(averages * d).data();
  }
  visit_activation(args.cache.k.dtype, [&]<typename Cached>() {
    grouped ? launch_step<Cached, kGroupHeads>(ctx, p) : launch_step<Cached, 1>(ctx, p);
  });
  if (p.stretches > 1) {
    launch(ctx, "attention_step", join_kernel,
           {.blocks = dim3(static_cast<unsigned>(B * args.Hq)), .threads = dim3(kStepThreads)}, p);
  }
}

}  // namespace mamba3::cuda
