// Schedule of the backward. Token positions are sorted by id, stably: a radix sort of 8 bits a pass
// whose passes count the digits of every tile, scan the counts, and scatter. Then the tokens of one
// id are a run of the order. The order is cut into chunks; the chunk in which a run begins adds its
// part of the run to d_weight, the parts in later chunks are left in scratch and added in order by
// a second kernel. So no two blocks add to one row, and no sum depends on chance.

#include <utility>

#include "cuda/pack.cuh"
#include "ops/embedding.h"

namespace mamba3::cuda {

namespace {

constexpr int kPack = 4;

template <int n, typename T>
__global__ void gather(const int32_t* ids, const T* weight, float* out, int64_t M, int64_t V,
                       int64_t D) {
  const int64_t m = row_of_thread(), i = column_of_thread<n>();
  if (m >= M || i >= D) return;
  const int32_t id = ids[m];
  float values[n];
  if (id >= 0 && id < V) {
    load(weight + id * D + i, values);
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) values[j] = nanf("");
  }
  store(values, out + m * D + i);
}

constexpr int kDigits = 256, kTile = 1024, kTileWarps = kTile / kWarp;

__device__ int digit_of(int32_t id, int shift) {
  return (id >> shift) & (kDigits - 1);
}

// Ids outside of the vocabulary go behind it.
__device__ int32_t inside_or_last(int32_t id, int64_t V) {
  return id >= 0 && id < V ? id : static_cast<int32_t>(V);
}

// counts (kDigits, tiles): how often a digit occurs in a tile.
__global__ void __launch_bounds__(kTile)
    count_digits(const int32_t* ids, int64_t M, int64_t V, int shift, int32_t* counts) {
  __shared__ int32_t count[kDigits];
  if (threadIdx.x < kDigits) count[threadIdx.x] = 0;
  __syncthreads();
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  if (m < M) atomicAdd(&count[digit_of(inside_or_last(ids[m], V), shift)], 1);
  __syncthreads();
  if (threadIdx.x < kDigits)
    counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Each count becomes the sum of those before it; one block.
__global__ void __launch_bounds__(kTile) scan_counts(int32_t* counts, int64_t n) {
  __shared__ int32_t sums[kTileWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t before = 0;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t i = begin + threadIdx.x;
    const int32_t count = i < n ? counts[i] : 0;
    int32_t sum = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    int32_t total = 0;
    for (int w = 0; w < kTileWarps; ++w) {
      if (w == warp) sum += total;
      total += sums[w];
    }
    if (i < n) counts[i] = before + sum - count;
    before += total;
    __syncthreads();
  }
}

// positions null: those of the first pass, 0, 1, 2, ...
__global__ void __launch_bounds__(kTile)
    scatter(const int32_t* ids, const int32_t* positions, int64_t M, int64_t V, int shift,
            const int32_t* offsets, int32_t* sorted_ids, int32_t* sorted_positions) {
  __shared__ int32_t count[kTileWarps][kDigits];
  for (int i = static_cast<int>(threadIdx.x); i < kTileWarps * kDigits; i += kTile)
    count[i / kDigits][i % kDigits] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t m = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const bool inside = m < M;
  const int32_t id = inside ? inside_or_last(ids[m], V) : 0;
  const int digit = digit_of(id, shift);
  const unsigned peers = __match_any_sync(~0u, inside ? digit : kDigits);
  const int rank = __popc(peers & ((1u << lane) - 1));
  if (inside && rank == 0) count[warp][digit] = __popc(peers);
  __syncthreads();
  if (threadIdx.x < kDigits) {  // of the warps before
    int32_t sum = 0;
    for (int w = 0; w < kTileWarps; ++w) sum += std::exchange(count[w][threadIdx.x], sum);
  }
  __syncthreads();
  if (!inside) return;
  const int64_t to =
      offsets[static_cast<int64_t>(digit) * gridDim.x + blockIdx.x] + count[warp][digit] + rank;
  sorted_ids[to] = id;
  sorted_positions[to] = positions == nullptr ? static_cast<int32_t>(m) : positions[m];
}

struct Order {
  const int32_t *ids, *positions;  // (M), by id, then by position
};

Order sort(Context& ctx, const int32_t* ids, int64_t M, int64_t V, ScratchScope& scope) {
  const char* const op = "embedding_backward";
  const unsigned tiles = blocks_for(M, kTile);
  int32_t* const counts = scope.take<int32_t>(int64_t{kDigits} * tiles).data();
  int32_t* const memory = scope.take<int32_t>(4 * M).data();
  Order from{ids, nullptr};
  int32_t *to_ids = memory, *to_positions = memory + M;
  for (int shift = 0; shift == 0 || V >> shift > 0; shift += 8) {
    launch(ctx, op, count_digits, {.blocks = {tiles}, .threads = {kTile}}, from.ids, M, V, shift,
           counts);
    launch(ctx, op, scan_counts, {.blocks = {1}, .threads = {kTile}}, counts,
           int64_t{kDigits} * tiles);
    launch(ctx, op, scatter, {.blocks = {tiles}, .threads = {kTile}}, from.ids, from.positions, M,
           V, shift, counts, to_ids, to_positions);
    from = {to_ids, to_positions};
    to_ids = to_ids == memory ? memory + 2 * M : memory;
    to_positions = to_ids + M;
  }
  return from;
}

constexpr int kChunk = 32;  // of the order

// Whether the run at place p of the order began before it.
__device__ bool goes_on(const int32_t* ids, int64_t p) {
  return p > 0 && ids[p] == ids[p - 1];
}

// The chunk's sums of runs: of those that begin here to d_weight, of one that began earlier to
// parts (chunks, D).
template <int n>
__global__ void add_runs(Order order, const float* d_out, int64_t M, int64_t V, int64_t D,
                         float* parts, float* d_weight) {
  const int64_t chunk = row_of_thread(), i = column_of_thread<n>();
  const int64_t begin = chunk * kChunk, end = min(begin + kChunk, M);
  if (begin >= M || i >= D) return;
  float sum[n] = {};
  bool began_here = !goes_on(order.ids, begin);
#pragma unroll 4
  for (int64_t p = begin; p < end; ++p) {
    float d[n];
    load(d_out + order.positions[p] * D + i, d);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += d[j];
    const int32_t id = order.ids[p];
    if (p + 1 < end && order.ids[p + 1] == id) continue;
    if (!began_here) {
      store(sum, parts + chunk * D + i);
    } else if (id < V) {
      float total[n];
      load(d_weight + id * D + i, total);
#pragma unroll
      for (int j = 0; j < n; ++j) total[j] += sum[j];
      store(total, d_weight + id * D + i);
    }
    began_here = true;
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] = 0;
  }
}

// The first chunk that a run goes on in adds its part and those that follow. A block is a chunk's,
// and its rows of threads take the parts in turns: with few ids runs are long.
constexpr int kPartRows = 16;

template <int n>
__global__ void add_parts(Order order, int64_t M, int64_t V, int64_t D, const float* parts,
                          float* d_weight) {
  __shared__ float sums[kPartRows][kWarp * n];
  int64_t chunk = blockIdx.x;
  const int64_t i = (int64_t{blockIdx.y} * kWarp + threadIdx.x) * n, begin = chunk * kChunk;
  if (!goes_on(order.ids, begin)) return;
  const int32_t id = order.ids[begin];
  // begin > 0, so there is a chunk before: did the run go on there already?
  const int64_t before = begin - kChunk;
  if (order.ids[before] == id && goes_on(order.ids, before)) return;
  if (id >= V) return;
  float sum[n] = {};
  chunk += threadIdx.y;
  for (; i < D && chunk * kChunk < M && order.ids[chunk * kChunk] == id; chunk += kPartRows) {
    float part[n];
    load(parts + chunk * D + i, part);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += part[j];
  }
#pragma unroll
  for (int j = 0; j < n; ++j) sums[threadIdx.y][threadIdx.x * n + j] = sum[j];
  __syncthreads();
  if (threadIdx.y > 0 || i >= D) return;
  for (int row = 1; row < kPartRows; ++row) {
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += sums[row][threadIdx.x * n + j];
  }
  float total[n];
  load(d_weight + id * D + i, total);
#pragma unroll
  for (int j = 0; j < n; ++j) total[j] += sum[j];
  store(total, d_weight + id * D + i);
}

}  // namespace

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const int64_t M = args.ids.dim(0), V = args.weight.dim(0), D = args.weight.dim(1);
  visit_weight(args.weight.dtype, [&]<typename T>() {
    visit_packs<kPack>(D, {args.weight, args.out}, [&]<int n>() {
      launch(ctx, "embedding", gather<n, T>, grid_of_elements(M, D, n), data<int32_t>(args.ids),
             data<T>(args.weight), data<float>(args.out), M, V, D);
    });
  });
}

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  const int64_t M = args.ids.dim(0), V = args.d_weight.dim(0), D = args.d_weight.dim(1);
  if (M == 0) return;
  ScratchScope scope(ctx.scratch);
  const Order order = sort(ctx, data<int32_t>(args.ids), M, V, scope);
  const int64_t chunks = (M + kChunk - 1) / kChunk;
  float* const parts = scope.take<float>(chunks * D).data();
  visit_packs<kPack>(D, {args.d_out, args.d_weight}, [&]<int n>() {
    const Grid grid = grid_of_elements(chunks, D, n);
    launch(ctx, "embedding_backward", add_runs<n>, grid, order, data<float>(args.d_out), M, V, D,
           parts, data<float>(args.d_weight));
    launch(ctx, "embedding_backward", add_parts<n>,
           {.blocks = {blocks_for(chunks, 1), blocks_for(D, kWarp * n)},
            .threads = {kWarp, kPartRows}},
           order, M, V, D, parts, data<float>(args.d_weight));
  });
}

}  // namespace mamba3::cuda
