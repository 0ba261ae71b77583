#include <cmath>

#include "cuda/attention.cuh"
#include "ops/attention.h"

// Schedule. With a cache, a first kernel appends the new keys and values, and everybody reads them
// there. Then a block of threads takes 64 consecutive queries of one head and walks over the keys
// that they see, with the softmax kept online (Milakov & Gimelshein 2018; Dao et al. 2022): in each
// tile the scores, the new largest, the rescaling of what is there, the product with the values. Of
// two slots one holds keys, the other values, so that one is loaded while the other is used.
// Lengths are known to the device only: the grid is made for T queries, a block finds out by itself
// where its keys begin and end. Packed sequences are one row of tokens: a block that holds tokens
// of several starts where the first of them starts and masks for each query what is not its own.

namespace mamba3::cuda {

namespace {

struct ForwardParams {
  Heads q, k, v, y;
  float* lse = nullptr;  // (B, Hq, T), or null
  Sequences sequences;
  const int32_t *rows = nullptr, *lengths = nullptr;  // of the cache, or null
  int B = 0, Hq = 0, Hkv = 0;
  float scale = 0;  // of scores, in powers of 2
};

template <typename Engine>
__global__ void __launch_bounds__(Engine::kThreads) attention_kernel(ForwardParams p) {
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

  const int past = p.lengths != nullptr ? p.lengths[b] : 0;
  const int kv_row = p.rows != nullptr ? p.rows[b] : b;
  const int kv_head = h / (p.Hq / p.Hkv);
  const int k_begin = p.sequences.cu_seqlens != nullptr ? p.sequences.around(q_begin).x : 0;
  const int k_end = past + q_begin + queries;
  int first[kMyRows], last[kMyRows];  // that each of my queries sees
#pragma unroll
  for (int i = 0; i < kMyRows; ++i) {
    const int token = min(q_begin + engine.row(i), T - 1);
    first[i] = p.sequences.cu_seqlens != nullptr ? p.sequences.around(token).x : 0;
    last[i] = past + token;
  }

  typename Engine::Resident q;
  engine.load(q, p.q.rows(b, q_begin, h, queries));
  float o[kMyRows][kMyDims] = {}, largest[kMyRows], sum[kMyRows];
#pragma unroll
  for (int i = 0; i < kMyRows; ++i) {
    largest[i] = -INFINITY;
    sum[i] = 0.0f;  // over my columns
  }

  const auto tile = [&](const Heads& heads, int from) {
    return heads.rows(kv_row, from, kv_head, min(kColumns, k_end - from));
  };
  engine.fetch(0, tile(p.k, k_begin));
  for (int k0 = k_begin; k0 < k_end; k0 += kColumns) {
    const Rows values = tile(p.v, k0);
    engine.wait();  // for the keys; the values before are used
    engine.fetch(1, values);
    float s[kMyRows][kMyColumns];
    engine.dots(q, 0, tile(p.k, k0), s);
    engine.wait();  // for the values; the keys are used
    if (k0 + kColumns < k_end) engine.fetch(0, tile(p.k, k0 + kColumns));

#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) {
        const int key = k0 + engine.column(j);
        if (key < first[i] || key > last[i]) s[i][j] = -INFINITY;
        top = fmaxf(top, s[i][j]);
      }
      top = fmaxf(largest[i], p.scale * lanes_max<Engine::kRowLanes>(top));
      const float base = top == -INFINITY ? 0.0f : top;  // nothing seen so far: weights are 0
      const float correction = exp2f(largest[i] - base);
      largest[i] = top;
      sum[i] *= correction;
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) {
        s[i][j] = exp2f(fmaf(s[i][j], p.scale, -base));
        sum[i] += s[i][j];
      }
#pragma unroll
      for (int c = 0; c < kMyDims; ++c) o[i][c] *= correction;
    }
    engine.accumulate(s, 1, values, o);
  }

#pragma unroll
  for (int i = 0; i < kMyRows; ++i) {
    const float total = lanes_sum<Engine::kRowLanes>(sum[i]);
#pragma unroll
    for (int c = 0; c < kMyDims; ++c) o[i][c] /= total;
    if (p.lse != nullptr && engine.row(i) < queries && engine.column(0) == 0) {
      p.lse[(static_cast<int64_t>(b) * p.Hq + h) * T + q_begin + engine.row(i)] =
          largest[i] * kLn2 + logf(total);
    }
  }
  engine.store(p.y.rows(b, q_begin, h, queries), o);
}

template <typename Engine>
void launch_forward(Context& ctx, const ForwardParams& p) {
  const int64_t blocks = blocks_for(p.sequences.T, Engine::kRows);
  launch(ctx, "attention", attention_kernel<Engine>,
         {.blocks = dim3(static_cast<unsigned>(blocks * p.B * p.Hq)),
          .threads = dim3(Engine::kThreads),
          .shared_bytes = Engine::shared_bytes()},
         p);
}

constexpr int kAppendThreads = 256;

// A block takes one token: k (B, T, Hkv d) to the cache at lengths[b] + t; so v.
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(Heads k, Heads v, Heads cached_k, Heads cached_v, const int32_t* rows,
                  const int32_t* lengths, int T, int Hkv) {
  const int b = static_cast<int>(blockIdx.x) / T, t = static_cast<int>(blockIdx.x) % T;
  // All heads of a token lie side by side: one wide head.
  k.d = v.d = cached_k.d = cached_v.d = k.d * Hkv;
  const Rows from_k = k.rows(b, t, 0, 1), from_v = v.rows(b, t, 0, 1);
  const Rows to_k = cached_k.rows(rows[b], lengths[b] + t, 0, 1);
  const Rows to_v = cached_v.rows(rows[b], lengths[b] + t, 0, 1);
  for (int i = static_cast<int>(threadIdx.x); i < k.d; i += kAppendThreads) {
    to_k.set(0, i, from_k.at(0, i));
    to_v.set(0, i, from_v.at(0, i));
  }
}

}  // namespace

void attention(Context& ctx, const AttentionArgs& args) {
  const int64_t B = args.qkv.dim(0), T = args.qkv.dim(1), d = args.d;
  ForwardParams p{
      .q = heads_of(args.qkv, 0, d),
      .k = heads_of(args.qkv, args.Hq, d),
      .v = heads_of(args.qkv, args.Hq + args.Hkv, d),
      .y = heads_of(args.y, 0, d),
      .lse = data<float>(args.lse),
      .sequences = sequences_of(args.cu_seqlens, T),
      .B = static_cast<int>(B),
      .Hq = static_cast<int>(args.Hq),
      .Hkv = static_cast<int>(args.Hkv),
      .scale = kLog2E / std::sqrt(static_cast<float>(d)),
  };
  if (!args.cache.k.empty()) {
    const Heads k = heads_of(args.cache.k, 0, d), v = heads_of(args.cache.v, 0, d);
    p.rows = data<const int32_t>(args.cache.rows);
    p.lengths = data<const int32_t>(args.cache.lengths);
    launch(ctx, "attention", append_kernel,
           {.blocks = dim3(static_cast<unsigned>(B * T)), .threads = dim3(kAppendThreads)}, p.k,
           p.v, k, v, p.rows, p.lengths, p.sequences.T, p.Hkv);
    p.k = k;
    p.v = v;
  }
  if (p.q.bf16 && p.k.bf16 && d <= 64) return launch_forward<MatrixUnits<64, 64, 2>>(ctx, p);
  if (p.q.bf16 && p.k.bf16 && d <= 128) return launch_forward<MatrixUnits<128, 64, 2>>(ctx, p);
  if (d <= 64) return launch_forward<PlainTiles<64>>(ctx, p);
  if (d <= 128) return launch_forward<PlainTiles<128>>(ctx, p);
  return launch_forward<PlainTiles<kWidestGpuHead>>(ctx, p);
}

}  // namespace mamba3::cuda
