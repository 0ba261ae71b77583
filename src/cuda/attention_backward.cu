#include <cmath>

#include "cuda/attention.cuh"
#include "ops/attention.h"

// Schedule. A first kernel takes y.d_y of every token and head. Then the probabilities are formed
// again from lse, twice: once by blocks of 64 queries, for the gradient of q, and once by blocks of
// 64 keys, for those of k and v, which sum over later queries and over the query heads that share
// them. That costs two products more than one pass, but every gradient is summed by one block in a
// fixed order. Tiles come in pairs (keys and values, or queries and d_y), and the next pair is
// loaded while one is used. With p = e^(s - lse), the gradients are
//   d_v = p^T d_y,   d_s = p (d_y v^T - y.d_y) / sqrt(d),   d_q = d_s k,   d_k = d_s^T q

namespace mamba3::cuda {

namespace {

struct BackwardParams {
  Heads q, k, v, y, d_y, d_q, d_k, d_v;
  const float* lse = nullptr;  // (B, Hq, T)
  float* y_dot_d_y = nullptr;  // (B, Hq, T)
  Sequences sequences;
  int B = 0, Hq = 0, Hkv = 0;
  float scale = 0;
};

constexpr int kDotThreads = 256;

// A warp takes one token of one head.
__global__ void __launch_bounds__(kDotThreads) dots_kernel(BackwardParams p) {
  const int T = p.sequences.T, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = (blockIdx.x * static_cast<int64_t>(kDotThreads) + threadIdx.x) / kWarp;
  if (i >= static_cast<int64_t>(p.B) * T * p.Hq) return;
  const int64_t h = i % p.Hq, t = i / p.Hq % T, b = i / p.Hq / T;
  const Rows y = p.y.rows(b, t, h, 1), d_y = p.d_y.rows(b, t, h, 1);
  float sum = 0;
  for (int c = lane; c < y.d; c += kWarp) sum = fmaf(y.at(0, c), d_y.at(0, c), sum);
  sum = warp_sum(sum);
  if (lane == 0) p.y_dot_d_y[(b * p.Hq + h) * T + t] = sum;
}

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads) queries_kernel(BackwardParams p) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  Engine engine(shared);
  constexpr int kMyRows = Engine::kMyRows, kMyColumns = Engine::kMyColumns;
  constexpr int kMyDims = Engine::kMyDims, kColumns = Engine::kColumns;

  // The heads that share keys run side by side, the last queries, which see the most, first.
  const int T = p.sequences.T;
  const int h = static_cast<int>(blockIdx.x % p.Hq);
  const int b = static_cast<int>(blockIdx.x / p.Hq % p.B);
  const int block = static_cast<int>(gridDim.x / (p.Hq * p.B) - 1 - blockIdx.x / p.Hq / p.B);
  const int q_begin = block * Engine::kRows, queries = min(Engine::kRows, T - q_begin);
  const int kv_head = h / (p.Hq / p.Hkv);
  const int k_begin = p.sequences.around(q_begin).x, k_end = q_begin + queries;

  int first[kMyRows], last[kMyRows];  // the keys that my queries see
  float lse[kMyRows], y_dot_d_y[kMyRows];
#pragma unroll
  for (int i = 0; i < kMyRows; ++i) {
    const int token = min(q_begin + engine.row(i), T - 1);
    const int64_t at = (static_cast<int64_t>(b) * p.Hq + h) * T + token;
    first[i] = p.sequences.around(token).x;
    last[i] = token;
    lse[i] = p.lse[at];
    y_dot_d_y[i] = p.y_dot_d_y[at];
  }

  typename Engine::Resident q, d_y;
  engine.load(q, p.q.rows(b, q_begin, h, queries));
  engine.load(d_y, p.d_y.rows(b, q_begin, h, queries));
  float d_q[kMyRows][kMyDims] = {};

  const auto tile = [&](const Heads& heads, int from) {
    return heads.rows(b, from, kv_head, min(kColumns, k_end - from));
  };
  engine.fetch(0, tile(p.k, k_begin));
  engine.fetch(1, tile(p.v, k_begin));
  int slot = 0;
  for (int k0 = k_begin; k0 < k_end; k0 += kColumns, slot = 2 - slot) {
    engine.wait();
    if (k0 + kColumns < k_end) {
      engine.fetch(2 - slot, tile(p.k, k0 + kColumns));
      engine.fetch(3 - slot, tile(p.v, k0 + kColumns));
    }
    float s[kMyRows][kMyColumns], d_p[kMyRows][kMyColumns];
    const Rows keys = tile(p.k, k0);
    engine.dots(q, slot, keys, s);
    engine.dots(d_y, slot + 1, tile(p.v, k0), d_p);
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) {
        const int key = k0 + engine.column(j);
        const bool seen = key >= first[i] && key <= last[i];
        const float probability = expf(fmaf(s[i][j], p.scale, -lse[i]));
        s[i][j] = seen ? probability * (d_p[i][j] - y_dot_d_y[i]) * p.scale : 0.0f;
      }
    }
    engine.accumulate(s, slot, keys, d_q);
  }
  engine.store(p.d_q.rows(b, q_begin, h, queries), d_q);
}

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads) keys_kernel(BackwardParams p) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  Engine engine(shared);
  constexpr int kMyRows = Engine::kMyRows, kMyColumns = Engine::kMyColumns;
  constexpr int kMyDims = Engine::kMyDims, kColumns = Engine::kColumns;

  // The first keys, which are seen the most, come first.
  const int T = p.sequences.T, group = p.Hq / p.Hkv;
  const int kv_head = static_cast<int>(blockIdx.x % p.Hkv);
  const int b = static_cast<int>(blockIdx.x / p.Hkv % p.B);
  const int block = static_cast<int>(blockIdx.x / p.Hkv / p.B);
  const int k_begin = block * Engine::kRows, keys = min(Engine::kRows, T - k_begin);
  const int q_end = p.sequences.around(k_begin + keys - 1).y;

  int first[kMyRows], end[kMyRows];  // the queries that see my keys
#pragma unroll
  for (int i = 0; i < kMyRows; ++i) {
    first[i] = min(k_begin + engine.row(i), T - 1);
    end[i] = p.sequences.around(first[i]).y;
  }

  typename Engine::Resident k, v;
  engine.load(k, p.k.rows(b, k_begin, kv_head, keys));
  engine.load(v, p.v.rows(b, k_begin, kv_head, keys));
  float d_k[kMyRows][kMyDims] = {}, d_v[kMyRows][kMyDims] = {};

  // The tiles of all query heads of the group, one head after the other.
  const int tiles = (q_end - k_begin + kColumns - 1) / kColumns;
  const auto tile = [&](const Heads& heads, int i) {
    const int from = k_begin + i % tiles * kColumns;
    return heads.rows(b, from, kv_head * group + i / tiles, min(kColumns, q_end - from));
  };
  engine.fetch(0, tile(p.q, 0));
  engine.fetch(1, tile(p.d_y, 0));
  int slot = 0;
  for (int n = 0; n < tiles * group; ++n, slot = 2 - slot) {
    engine.wait();
    if (n + 1 < tiles * group) {
      engine.fetch(2 - slot, tile(p.q, n + 1));
      engine.fetch(3 - slot, tile(p.d_y, n + 1));
    }
    float s[kMyRows][kMyColumns], d_p[kMyRows][kMyColumns];
    const Rows q = tile(p.q, n), d_y = tile(p.d_y, n);
    engine.dots(k, slot, q, s);
    engine.dots(v, slot + 1, d_y, d_p);
    const int q0 = k_begin + n % tiles * kColumns;
    const int64_t head = (static_cast<int64_t>(b) * p.Hq + kv_head * group + n / tiles) * T;
#pragma unroll
    for (int j = 0; j < kMyColumns; ++j) {
      const int query = q0 + engine.column(j);
      const int64_t at = head + min(query, q_end - 1);
      const float lse = p.lse[at], y_dot_d_y = p.y_dot_d_y[at];
#pragma unroll
      for (int i = 0; i < kMyRows; ++i) {
        const bool seen = query >= first[i] && query < end[i];
        const float probability = expf(fmaf(s[i][j], p.scale, -lse));
        s[i][j] = seen ? probability : 0.0f;
        d_p[i][j] = s[i][j] * (d_p[i][j] - y_dot_d_y) * p.scale;
      }
    }
    engine.accumulate(s, slot + 1, d_y, d_v);
    engine.accumulate(d_p, slot, q, d_k);
  }
  engine.store(p.d_k.rows(b, k_begin, kv_head, keys), d_k);
  engine.store(p.d_v.rows(b, k_begin, kv_head, keys), d_v);
}

template <typename QueriesEngine, typename KeysEngine>
void launch_backward(Context& ctx, const BackwardParams& p) {
  const int64_t query_blocks = blocks_for(p.sequences.T, QueriesEngine::kRows);
  launch(ctx, "attention_backward", queries_kernel<QueriesEngine>,
         {.blocks = dim3(static_cast<unsigned>(query_blocks * p.B * p.Hq)),
          .threads = dim3(QueriesEngine::kThreads),
          .shared_bytes = QueriesEngine::shared_bytes()},
         p);
  const int64_t key_blocks = blocks_for(p.sequences.T, KeysEngine::kRows);
  launch(ctx, "attention_backward", keys_kernel<KeysEngine>,
         {.blocks = dim3(static_cast<unsigned>(key_blocks * p.B * p.Hkv)),
          .threads = dim3(KeysEngine::kThreads),
          .shared_bytes = KeysEngine::shared_bytes()},
         p);
}

}  // namespace

void attention_backward(Context& ctx, const AttentionBackwardArgs& args) {
  const int64_t B = args.qkv.dim(0), T = args.qkv.dim(1), d = args.d;
  ScratchScope scope(ctx.scratch);
  const BackwardParams p{
      .q = heads_of(args.qkv, 0, d),
      .k = heads_of(args.qkv, args.Hq, d),
      .v = heads_of(args.qkv, args.Hq + args.Hkv, d),
      .y = heads_of(args.y, 0, d),
      .d_y = heads_of(args.d_y, 0, d),
      .d_q = heads_of(args.d_qkv, 0, d),
      .d_k = heads_of(args.d_qkv, args.Hq, d),
      .d_v = heads_of(args.d_qkv, args.Hq + args.Hkv, d),
      .lse = data<float>(args.lse),
      .y_dot_d_y = scope.take<float>(B * args.Hq * T).data(),
      .sequences = sequences_of(args.cu_seqlens, T),
      .B = static_cast<int>(B),
      .Hq = static_cast<int>(args.Hq),
      .Hkv = static_cast<int>(args.Hkv),
      .scale = 1.0f / std::sqrt(static_cast<float>(d)),
  };
  launch(ctx, "attention_backward", dots_kernel,
         {.blocks = dim3(blocks_for(B * T * args.Hq, kDotThreads / kWarp)),
          .threads = dim3(kDotThreads)},
         p);
  // Two gradients of 128 dims leave few registers: tiles of 16.
  if (p.q.bf16 && d <= 64) {
    return launch_backward<MatrixUnits<64, 32, 4>, MatrixUnits<64, 32, 4>>(ctx, p);
  }
  if (p.q.bf16 && d <= 128) {
    return launch_backward<MatrixUnits<128, 32, 4>, MatrixUnits<128, 16, 4>>(ctx, p);
  }
  if (d <= 64) return launch_backward<PlainTiles<64>, PlainTiles<64>>(ctx, p);
  if (d <= 128) return launch_backward<PlainTiles<128>, PlainTiles<128>>(ctx, p);
  return launch_backward<PlainTiles<kWidestGpuHead>, PlainTiles<kWidestGpuHead>>(ctx, p);
}

}  // namespace mamba3::cuda
