// Schedule. A block a row, which is read a few times from the L2 cache. Every filter keeps the
// first tokens of the order "larger logit first, lower id first on a tie", so what is kept is known
// by its last token, the cut; nothing is sorted, moved or overwritten. With a repeat penalty the
// row is first copied and changed in the copy.
//
// The cut of top-k (take tokens until k are taken) and that of top-p (until top_p of the weight is)
// are one problem, solved in `cut_at`: measure the tokens into bins of distance to the largest
// logit, find the bin in which the target is passed, collect its tokens, and narrow down the range
// of their bits, 11 at a time, until one value is left.
//
// Weights exp(...) are at most 1 and are summed as integers in units of 2^-40: so sums are exact,
// in whatever order threads add, and the draw is a function of the logits alone.

#include <cmath>
#include <limits>

#include "core/random.h"
#include "cuda/pack.cuh"
#include "ops/sample.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
constexpr int kBins = 2048, kBinBits = 11;
constexpr float kBinsPerUnit = 32;  // of the logits; 64 units below the largest are told apart

// Whole numbers that order as the logits do; -0 is 0.
__device__ uint32_t key_of(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
constexpr uint32_t kKeyOfMinusInfinity = 0x007fffffu;

// Keeps the tokens that order before or equal to (key, id).
struct Cut {
  uint32_t key = kKeyOfMinusInfinity;  // and such tokens with ids up to
  int32_t id = -1;

  __device__ bool keeps(uint32_t k, int32_t i) const { return k > key || (k == key && i <= id); }
};

// A weight in [0, 1] as an integer; not a number is 0, but such rows were refused before.
__device__ uint64_t fixed(float weight) {
  return static_cast<uint64_t>(weight * 0x1p40f);
}

template <typename T>
__device__ T warp_total(T value) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}

// What the threads of a block share.
struct Shared {
  uint32_t low[kBins], high[kBins];  // sums of 64 bits in two halves, which have fast atomics
  uint64_t warps[kWarps];
  uint64_t before;
  uint32_t key_low, key_high;
  int32_t count, bin, chosen;

  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) low[i] = high[i] = 0;
  }
  __device__ void add(int bin_, uint64_t measure) {
    const uint32_t lower = static_cast<uint32_t>(measure);
    uint32_t upper = static_cast<uint32_t>(measure >> 32);
    const uint32_t old = atomicAdd(&low[bin_], lower);
    upper += old + lower < old;
    if (upper > 0) atomicAdd(&high[bin_], upper);
  }
  __device__ uint64_t sum_of(int bin_) const { return uint64_t{high[bin_]} << 32 | low[bin_]; }
};

// The sum over the block, in every thread.
__device__ uint64_t block_total(Shared& shared, uint64_t value) {
  value = warp_total(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_total(shared.warps[threadIdx.x % kWarp]);
}

// The sum over the threads before this one.
__device__ uint64_t block_sum_before(Shared& shared, uint64_t value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  uint64_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) shared.warps[warp] = sum;
  __syncthreads();
  uint64_t before = 0;
  for (int w = 0; w < warp; ++w) before += shared.warps[w];
  return before + sum - value;
}

struct Params {
  const float* logits;
  int64_t stride;
  int64_t B, vocab;
  int32_t* out;
  int32_t* found;           // (B, vocab), room for the tokens of a bin; null if nothing is selected
  float temperature, rate;  // 1 / temperature
  int32_t top_k;
  float top_p;
  float log_min_p;  // -infinity: off
  uint64_t seed, position;
  const int64_t* step;  // or null
  int64_t step_stride;  // 0: one for all rows
  const int32_t* rows;  // or null
  uint32_t first_row;
};

struct Row {
  const float* x;
  int64_t n;
  float max;

  // Calls body(logit, id) for the ids of [begin, end) that fall to thread `index` of kGroup.
  // Several loads are on their way at once: one block has to read the row.
  template <int kGroup, typename Body>
  __device__ void for_each(int64_t begin, int64_t end, int index, Body&& body) const {
    constexpr int kEach = 4, kAhead = 4, kStretch = kGroup * kEach * kAhead;
    if (reinterpret_cast<uintptr_t>(x + begin) % (kEach * sizeof(float)) == 0) {
      for (; begin + kStretch <= end; begin += kStretch) {
        float values[kAhead][kEach];
        const int64_t first = begin + index * kEach;
#pragma unroll
        for (int a = 0; a < kAhead; ++a) load(x + first + a * kGroup * kEach, values[a]);
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
#pragma unroll
          for (int j = 0; j < kEach; ++j)
            body(values[a][j], static_cast<int32_t>(first + a * kGroup * kEach + j));
        }
      }
    }
#pragma unroll 4
    for (int64_t i = begin + index; i < end; i += kGroup) body(x[i], static_cast<int32_t>(i));
  }
  template <typename Body>
  __device__ void for_each(Body&& body) const {
    for_each<kThreads>(0, n, static_cast<int>(threadIdx.x), body);
  }

  __device__ uint64_t weight(float logit, float rate) const {
    return fixed(expf((logit - max) * rate));
  }
};

// What tokens are counted by: one each, or their weight at temperature 1.
struct Measure {
  const Row& row;
  bool weights;

  __device__ uint64_t of(float logit) const { return weights ? row.weight(logit, 1) : 1; }
};

// The bin in which the sums of the bins, from 0 on, reach `target`, and the sum of those before it;
// kBins if they do not.
struct Found {
  int bin;
  uint64_t before;
};

__device__ Found find_bin(Shared& shared, uint64_t target) {
  constexpr int kEach = kBins / kThreads;
  uint64_t sums[kEach], own = 0;
  if (threadIdx.x == 0) shared.bin = kBins;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    sums[i] = shared.sum_of(static_cast<int>(threadIdx.x) * kEach + i);
    own += sums[i];
  }
  uint64_t before = block_sum_before(shared, own);  // has barriers
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before < target && before + sums[i] >= target) {
      shared.bin = static_cast<int>(threadIdx.x) * kEach + i;
      shared.before = before;
    }
    before += sums[i];
  }
  __syncthreads();
  const Found found{shared.bin, shared.before};
  __syncthreads();
  return found;
}

// Nearer to the largest logit: lower.
__device__ int bin_of(const Row& row, float logit) {
  return static_cast<int>(fminf((row.max - logit) * kBinsPerUnit, static_cast<float>(kBins - 1)));
}

// The lowest id so that `wanted` of the tokens found with this key have ids up to it.
__device__ int32_t id_of_tie(const Row& row, Shared& shared, const int32_t* found, int32_t count,
                             uint32_t key, uint64_t wanted) {
  int32_t low = 0, high = static_cast<int32_t>(row.n) - 1;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    uint64_t own = 0;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads)
      own += found[i] <= middle && key_of(row.x[found[i]]) == key;
    if (block_total(shared, own) >= wanted) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The first token, in the order of ranks, with which the measures of those that `cut` keeps reach
// the target: `target` itself if it is not 0, or else `share` of the sum. If they do not, `cut`.
__device__ Cut cut_at(const Row& row, Shared& shared, int32_t* found, const Cut& cut,
                      const Measure& measure, uint64_t target, float share) {
  __syncthreads();
  shared.clear();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  uint64_t own = 0;
  row.for_each([&](float logit, int32_t id) {
    if (!cut.keeps(key_of(logit), id)) return;
    const uint64_t value = measure.of(logit);
    own += value;
    if (value > 0) shared.add(bin_of(row, logit), value);
  });
  if (target == 0) {
    const uint64_t total = block_total(shared, own);
    const double part = ceil(static_cast<double>(share) * static_cast<double>(total));
    target = min(max(static_cast<uint64_t>(part), uint64_t{1}), total);
  }
  __syncthreads();
  Found at = find_bin(shared, target);
  if (at.bin == kBins) return cut;
  target -= at.before;

  // The tokens of that bin, in any order, and the range of their keys.
  uint32_t low = ~0u, high = 0;
  if (threadIdx.x == 0) shared.key_low = low, shared.key_high = high;
  __syncthreads();
  row.for_each([&](float logit, int32_t id) {
    const uint32_t key = key_of(logit);
    if (!cut.keeps(key, id) || bin_of(row, logit) != at.bin) return;
    found[atomicAdd(&shared.count, 1)] = id;
    low = min(low, key);
    high = max(high, key);
  });
  low = __reduce_min_sync(~0u, low);
  high = __reduce_max_sync(~0u, high);
  if (threadIdx.x % kWarp == 0) {
    atomicMin(&shared.key_low, low);
    atomicMax(&shared.key_high, high);
  }
  __syncthreads();
  const int32_t count = shared.count;
  low = shared.key_low, high = shared.key_high;
  while (low < high) {
    const int bits = 32 - __clz(static_cast<int>(high - low));
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    __syncthreads();
    shared.clear();
    __syncthreads();
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
      const float logit = row.x[found[i]];
      const uint32_t key = key_of(logit);
      if (key >= low && key <= high)
        shared.add(static_cast<int>((high - key) >> shift), measure.of(logit));
    }
    __syncthreads();
    at = find_bin(shared, target);
    target -= at.before;
    high -= static_cast<uint32_t>(at.bin) << shift;
    const uint32_t width = (1u << shift) - 1;
    low = high - low > width ? high - width : low;
  }
  // Of the tokens with this logit the first few, as many as it takes.
  uint64_t own_ties = 0, own_measure = 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    const float logit = row.x[found[i]];
    if (key_of(logit) != low) continue;
    ++own_ties;
    own_measure += measure.of(logit);
  }
  const uint64_t ties = block_total(shared, own_ties), sum = block_total(shared, own_measure);
  const uint64_t each = sum / ties, wanted = (target + each - 1) / each;
  if (wanted >= ties) return {low, min(cut.key == low ? cut.id : INT32_MAX, INT32_MAX)};
  return {low, id_of_tie(row, shared, found, count, low, wanted)};
}

// The largest logit and its lowest id, or id -1 if the row has a NaN, +inf, or nothing but -inf.
__device__ int32_t find_largest(Row& row, Shared& shared) {
  uint64_t best = 0;  // key, then the complement of the id
  bool bad = false;
  row.for_each([&](float logit, int32_t id) {
    bad |= !(logit < INFINITY);
    const uint64_t candidate = uint64_t{key_of(logit)} << 32 | ~static_cast<uint32_t>(id);
    best = max(best, candidate);
  });
  bad = __syncthreads_or(bad);
  for (int lane = kWarp / 2; lane > 0; lane /= 2)
    best = max(best, __shfl_xor_sync(~0u, best, lane));
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = shared.warps[threadIdx.x % kWarp];
  for (int lane = kWarp / 2; lane > 0; lane /= 2)
    best = max(best, __shfl_xor_sync(~0u, best, lane));
  const int32_t id = static_cast<int32_t>(~static_cast<uint32_t>(best));
  if (bad || static_cast<uint32_t>(best >> 32) <= kKeyOfMinusInfinity) return -1;
  row.max = row.x[id];
  return id;
}

// The token at which the weights of those kept, summed in the order of ids, pass `uniform` of their
// total.
__device__ int32_t draw(const Row& row, Shared& shared, const Cut& cut, float rate,
                        double uniform) {
  const auto weight = [&](float logit, int32_t id) {
    return cut.keeps(key_of(logit), id) ? row.weight(logit, rate) : 0;
  };
  // Each warp sums a part of the ids; then the block looks into the part that has the token.
  constexpr int64_t kUnit = 128;
  const int64_t part = (row.n + kWarps * kUnit - 1) / (kWarps * kUnit) * kUnit;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  uint64_t own = 0;
  row.for_each<kWarp>(warp * part, min((warp + 1) * part, row.n), lane,
                      [&](float logit, int32_t id) { own += weight(logit, id); });
  own = warp_total(own);
  __syncthreads();
  if (lane == 0) shared.warps[warp] = own;
  if (threadIdx.x == 0) shared.chosen = 0;
  __syncthreads();
  const uint64_t total = warp_total(shared.warps[lane]);
  // What is left to pass: the token is the first whose sum, itself included, is above it.
  uint64_t left = min(static_cast<uint64_t>(uniform * static_cast<double>(total)), total - 1);
  int at = 0;
  while (at < kWarps - 1 && left >= shared.warps[at]) left -= shared.warps[at++];
  const int64_t end = min((at + 1) * part, row.n);
  for (int64_t from = at * part; from < end; from += kThreads) {
    const int64_t id = from + threadIdx.x;
    const uint64_t value = id < end ? weight(row.x[id], static_cast<int32_t>(id)) : 0;
    const uint64_t before = block_sum_before(shared, value);
    if (before <= left && left < before + value) shared.chosen = static_cast<int32_t>(id);
    const uint64_t sum = block_total(shared, value);
    if (left < sum) break;  // the same for all threads
    left -= sum;
  }
  __syncthreads();
  return shared.chosen;
}

__global__ void __launch_bounds__(kThreads) choose(Params p) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.x;
  Row row{p.logits + b * p.stride, p.vocab, 0};
  int32_t token = find_largest(row, shared);
  if (token >= 0 && p.temperature > 0) {
    Cut cut;
    int32_t* const found = p.found == nullptr ? nullptr : p.found + b * p.vocab;
    if (p.top_k > 0 && p.top_k < p.vocab) {
      cut = cut_at(row, shared, found, cut, {row, false}, static_cast<uint64_t>(p.top_k), 0);
    }
    if (p.top_p < 1) cut = cut_at(row, shared, found, cut, {row, true}, 0, p.top_p);
    const float least = row.max + p.log_min_p;
    if (least > -INFINITY) {
      const uint32_t key = key_of(least);
      if (key > cut.key) cut = {key, INT32_MAX};
    }
    const int64_t step = p.step == nullptr ? 0 : p.step[b * p.step_stride];
    const uint64_t position = p.position + static_cast<uint64_t>(step);
    const int64_t drawn_row = p.rows == nullptr ? b : p.rows[b];
    const double uniform =
        Random(p.seed, position, p.first_row + static_cast<uint32_t>(drawn_row)).uniform();
    token = draw(row, shared, cut, p.rate, uniform);
  }
  if (threadIdx.x == 0) p.out[b] = token;
}

__global__ void copy_rows(const float* logits, int64_t stride, float* to, int64_t B,
                          int64_t vocab) {
  const int64_t b = row_of_thread(), i = column_of_thread<1>();
  if (b < B && i < vocab) to[b * vocab + i] = logits[b * stride + i];
}

// A token that occurs several times is written several times, with one value.
__global__ void penalise(const float* logits, int64_t stride, const int32_t* history, int64_t L,
                         float penalty, float* to, int64_t B, int64_t vocab) {
  const int64_t b = row_of_thread(), i = column_of_thread<1>();
  if (b >= B || i >= L) return;
  const int32_t id = history[b * L + i];
  if (id < 0 || id >= vocab) return;
  const float logit = logits[b * stride + id];
  to[b * vocab + id] = logit > 0 ? logit / penalty : logit * penalty;
}

}  // namespace

void sample(Context& ctx, const SampleArgs& args) {
  const int64_t B = args.logits.dim(0), vocab = args.vocab;
  ScratchScope scope(ctx.scratch);
  const bool selects =
      args.temperature > 0 && ((args.top_k > 0 && args.top_k < vocab) || args.top_p < 1);
  Params params{
      .logits = data<float>(args.logits),
      .stride = row_stride(args.logits),
      .B = B,
      .vocab = vocab,
      .out = data<int32_t>(args.out),
      .found = selects ? scope.take<int32_t>(B * vocab).data() : nullptr,
      .temperature = args.temperature,
      .rate = std::min(1 / args.temperature, std::numeric_limits<float>::max()),
      .top_k = args.top_k,
      .top_p = args.top_p,
      .log_min_p = args.min_p > 0 ? std::log(args.min_p) : -std::numeric_limits<float>::infinity(),
      .seed = args.seed,
      .position = args.position,
      .step = data<int64_t>(args.step),
      .step_stride = !args.step.empty() && args.step.dim(0) > 1 ? 1 : 0,
      .rows = data<int32_t>(args.rows),
      .first_row = args.first_row};
  if (!args.history.empty() && args.repeat_penalty != 1) {
    float* const copied = scope.take<float>(B * vocab).data();
    const int64_t L = args.history.dim(1);
    launch(ctx, "sample", copy_rows, grid_of_elements(B, vocab, 1), params.logits, params.stride,
           copied, B, vocab);
    launch(ctx, "sample", penalise, grid_of_elements(B, L, 1), params.logits, params.stride,
           data<int32_t>(args.history), L, args.repeat_penalty, copied, B, vocab);
    params.logits = copied;
    params.stride = vocab;
  }
  launch(ctx, "sample", choose, {.blocks = {blocks_for(B, 1)}, .threads = {kThreads}}, params);
}

}  // namespace mamba3::cuda
