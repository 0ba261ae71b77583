#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

// Schedule. Forward: a task is a block of queries of one head; it walks the blocks of keys that its
// queries see, with the softmax kept online (Milakov & Gimelshein 2018; Dao et al. 2022), so that
// scores never leave the cache. Backward: the probabilities are formed again from lse, by one task
// for each block of keys (gradients of k and v) and one for each block of queries (gradient of q),
// which costs two products more than one pass but shares no sums between tasks. Step: a task is a
// stretch of the cache of one key head; the parts are joined in order. Blocks depend on the shape
// only, so the results do not depend on the number of threads.

#ifndef MAMBA3_CPU_ATTENTION_ONCE  // this file is compiled once for each instruction set
#define MAMBA3_CPU_ATTENTION_ONCE
namespace mamba3::cpu {

constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 128;
constexpr int64_t kStepKeys = 256;

// The products of a block of queries with a block of keys: (queries, keys) in rows of kKeys.
struct ScoreBlock {
  float* scores = nullptr;
  int64_t queries = 0, keys = 0;
  int64_t seen = 0;  // keys of the block that the first query sees; every later one sees one more
  float scale = 0;

  int64_t seen_by(int64_t query) const { return std::clamp<int64_t>(seen + query, 0, keys); }
  float* row(int64_t query) const { return scores + query * kKeys; }
};

// A softmax average in the making: the weights so far are relative to e^largest.
struct Average {
  float* largest = nullptr;  // (rows)
  float* sum = nullptr;      // (rows), of the weights
  float* out = nullptr;      // (rows, d), the weighted sum
  int64_t d = 0;
};

// One stretch of a cache for the query heads of one key head.
struct StepPart {
  const float *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t heads = 0, d = 0, keys = 0;
  int64_t kv_stride = 0;  // between tokens
  float scale = 0;
  Average average;  // a row for each head
};

}  // namespace mamba3::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

// row = exp(scale row - offset); returns the sum.
float exponentials(float* row, int64_t n, float scale, float offset) {
  const Vector factor = hn::Set(kLanes, scale), shift = hn::Set(kLanes, offset);
  Vector sum = hn::Zero(kLanes);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector e = exp(hn::MulSub(access.load(row + i), factor, shift));
    access.store(e, row + i);
    sum = hn::Add(sum, access.keep(e, hn::Zero(kLanes)));
  });
  return sum_of(sum);
}

float largest_of(const float* row, int64_t n) {
  const Vector lowest = hn::Set(kLanes, -std::numeric_limits<float>::infinity());
  Vector largest = lowest;
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    largest = hn::Max(largest, access.keep(access.load(row + i), lowest));
  });
  return max_of(largest);
}

void scale_row(float* row, int64_t n, float factor) {
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Mul(access.load(row + i), hn::Set(kLanes, factor)), row + i);
  });
}

// Scores to weights relative to the largest so far, and what is there already rescaled to it.
void softmax_block(const ScoreBlock& block, const Average& average) {
  for (int64_t i = 0; i < block.queries; ++i) {
    float* const row = block.row(i);
    const int64_t seen = block.seen_by(i);
    std::fill(row + seen, row + block.keys, 0.0f);
    if (seen == 0) continue;
    float& largest = average.largest[i];
    const float before = largest;
    largest = std::max(before, block.scale * largest_of(row, seen));
    const float correction = std::exp(before - largest);
    average.sum[i] = average.sum[i] * correction + exponentials(row, seen, block.scale, largest);
    if (correction != 1.0f) scale_row(average.out + i * average.d, average.d, correction);
  }
}

// Scores to probabilities p, and d_p, the gradient of p, to that of the products q.k:
//   p (d_p - y.d_y) scale
void score_gradient(const ScoreBlock& block, float* d_p, const float* lse, const float* y_dot_d_y) {
  const Vector scale = hn::Set(kLanes, block.scale);
  for (int64_t i = 0; i < block.queries; ++i) {
    float *const p_row = block.row(i), *const d_row = d_p + i * kKeys;
    const int64_t seen = block.seen_by(i);
    const Vector log_sum = hn::Set(kLanes, lse[i]), mean = hn::Set(kLanes, y_dot_d_y[i]);
    for_each_vector(seen, [&](auto access, int64_t j) HWY_ATTR {
      const Vector p = exp(hn::MulSub(access.load(p_row + j), scale, log_sum));
      access.store(p, p_row + j);
      const Vector excess = hn::Sub(access.load(d_row + j), mean);
      access.store(hn::Mul(hn::Mul(p, scale), excess), d_row + j);
    });
    std::fill(p_row + seen, p_row + block.keys, 0.0f);
    std::fill(d_row + seen, d_row + block.keys, 0.0f);
  }
}

// out[i] = a_i . b_i for n rows of d.
void row_dots(const float* a, const float* b, int64_t n, int64_t d, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = dot(a + i * d, b + i * d, d);
}

void step_part(const StepPart& part) {
  alignas(64) float weights[kStepKeys];
  for (int64_t head = 0; head < part.heads; ++head) {
    const float* q = part.q + head * part.d;
    for (int64_t j = 0; j < part.keys; ++j)
      weights[j] = dot(q, part.k + j * part.kv_stride, part.d);
    const float largest = part.scale * largest_of(weights, part.keys);
    part.average.largest[head] = largest;
    part.average.sum[head] = exponentials(weights, part.keys, part.scale, largest);
    float* const out = part.average.out + head * part.d;
    std::fill(out, out + part.d, 0.0f);
    for (int64_t j = 0; j < part.keys; ++j) {
      const float* v = part.v + j * part.kv_stride;
      const Vector weight = hn::Set(kLanes, weights[j]);
      for_each_vector(part.d, [&](auto access, int64_t c) HWY_ATTR {
        access.store(hn::MulAdd(weight, access.load(v + c), access.load(out + c)), out + c);
      });
    }
  }
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace mamba3::cpu {

HWY_EXPORT(softmax_block);
HWY_EXPORT(score_gradient);
HWY_EXPORT(row_dots);
HWY_EXPORT(step_part);

namespace {

int64_t blocks_of(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

float* token_row(const View& view, int64_t batch, int64_t token) {
  return view.as<float>() + batch * view.stride(0) + token * view.stride(1);
}

int64_t token_stride(const View& view) {
  return view.dim(1) > 1 ? view.stride(1) : view.dim(2);
}

// Consecutive tokens of one batch row, and where the keys and values that they see are.
struct Sequence {
  int64_t batch = 0, first = 0, tokens = 0;
  int64_t past = 0;  // keys before the first token's own
  const float *k = nullptr, *v = nullptr;
  int64_t kv_stride = 0;  // between tokens
};

template <typename Args>
Sequence sequence_of(const Args& args, int64_t batch, int64_t first, int64_t tokens) {
  const float* row = token_row(args.qkv, batch, first);
  return {.batch = batch,
          .first = first,
          .tokens = tokens,
          .past = 0,
          .k = row + args.Hq * args.d,
          .v = row + (args.Hq + args.Hkv) * args.d,
          .kv_stride = token_stride(args.qkv)};
}

template <typename Args>
std::vector<Sequence> sequences_of(const Args& args) {
  const int64_t B = args.qkv.dim(0), T = args.qkv.dim(1);
  std::vector<Sequence> sequences;
  if (args.cu_seqlens.empty()) {
    for (int64_t b = 0; b < B; ++b) sequences.push_back(sequence_of(args, b, 0, T));
    return sequences;
  }
  const int32_t* cu = args.cu_seqlens.template as<int32_t>();
  for (int64_t i = 0; i + 1 < args.cu_seqlens.dim(0); ++i) {
    if (cu[i] < cu[i + 1]) sequences.push_back(sequence_of(args, 0, cu[i], cu[i + 1] - cu[i]));
  }
  return sequences;
}

// Appends the new keys and values, and points the sequences at the cache.
void move_to_cache(Context& ctx, const AttentionArgs& args, std::vector<Sequence>& sequences) {
  const int64_t T = args.qkv.dim(1), T_max = args.cache.k.dim(1), columns = args.Hkv * args.d;
  const int32_t* rows = args.cache.rows.as<int32_t>();
  const int32_t* lengths = args.cache.lengths.as<int32_t>();
  const auto place = [&](const View& cache, int64_t b, int64_t token) {
    return cache.as<float>() + (rows[b] * T_max + token) * columns;
  };
  ctx.threads.parallel_for(args.qkv.dim(0) * T, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T, t = i % T;
      const Sequence& from = sequences[static_cast<size_t>(b)];
      std::copy_n(from.k + t * from.kv_stride, columns, place(args.cache.k, b, lengths[b] + t));
      std::copy_n(from.v + t * from.kv_stride, columns, place(args.cache.v, b, lengths[b] + t));
    }
  });
  for (Sequence& sequence : sequences) {
    sequence.past = lengths[sequence.batch];
    sequence.k = place(args.cache.k, sequence.batch, 0);
    sequence.v = place(args.cache.v, sequence.batch, 0);
    sequence.kv_stride = columns;
  }
}

// A block of consecutive tokens of a sequence, as queries or as keys.
struct Block {
  Sequence sequence;
  int64_t first = 0, size = 0;
};

// Every sequence in blocks. In causal attention the last queries have the most work and the last
// keys the least: `last_first` puts the long tasks in front.
std::vector<Block> split(const std::vector<Sequence>& sequences, int64_t size, bool last_first) {
  std::vector<Block> blocks;
  for (const Sequence& sequence : sequences) {
    for (int64_t first = 0; first < sequence.tokens; first += size) {
      blocks.push_back({sequence, first, std::min(size, sequence.tokens - first)});
    }
  }
  if (last_first) std::reverse(blocks.begin(), blocks.end());
  return blocks;
}

// Scratch of one thread.
struct BlockScratch {
  float *scores, *d_scores, *largest, *sum, *out;

  BlockScratch(float* base, int64_t d, int thread) {
    scores = base + thread * floats(d);
    d_scores = scores + kQueries * kKeys;
    largest = d_scores + kQueries * kKeys;
    sum = largest + kQueries;
    out = sum + kQueries;
  }
  static int64_t floats(int64_t d) { return kQueries * (2 * kKeys + 2 + d); }
};

float score_scale(int64_t d) {
  return 1.0f / std::sqrt(static_cast<float>(d));
}

// The products of queries [q0, q0 + queries) of head h with keys [k0, k0 + keys).
template <typename Args>
ScoreBlock scores(const Args& args, const Sequence& s, int64_t h, int64_t q0, int64_t queries,
                  int64_t k0, int64_t keys, float* out) {
  gemm_serial({.transpose_b = true,
               .M = queries,
               .N = keys,
               .K = args.d,
               .a = token_row(args.qkv, s.batch, s.first + q0) + h * args.d,
               .lda = token_stride(args.qkv),
               .b = s.k + k0 * s.kv_stride + h / (args.Hq / args.Hkv) * args.d,
               .ldb = s.kv_stride,
               .c = out,
               .ldc = kKeys});
  return {.scores = out,
          .queries = queries,
          .keys = keys,
          .seen = s.past + q0 + 1 - k0,
          .scale = score_scale(args.d)};
}

void forward_block(const AttentionArgs& args, const Block& block, int64_t h,
                   const BlockScratch& scratch) {
  const Sequence& s = block.sequence;
  const int64_t d = args.d, T = args.qkv.dim(1);
  const Average average{scratch.largest, scratch.sum, scratch.out, d};
  std::fill_n(average.largest, block.size, -std::numeric_limits<float>::infinity());
  std::fill_n(average.sum, block.size, 0.0f);
  std::fill_n(average.out, block.size * d, 0.0f);
  const int64_t end = s.past + block.first + block.size;
  for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
    const int64_t keys = std::min(kKeys, end - k0);
    const ScoreBlock products =
        scores(args, s, h, block.first, block.size, k0, keys, scratch.scores);
    HWY_DYNAMIC_DISPATCH(softmax_block)(products, average);
    gemm_serial({.M = block.size,
                 .N = d,
                 .K = keys,
                 .a = products.scores,
                 .lda = kKeys,
                 .b = s.v + k0 * s.kv_stride + h / (args.Hq / args.Hkv) * d,
                 .ldb = s.kv_stride,
                 .beta = 1.0f,
                 .c = average.out,
                 .ldc = d});
  }
  for (int64_t i = 0; i < block.size; ++i) {
    const int64_t token = s.first + block.first + i;
    float* const y = token_row(args.y, s.batch, token) + h * d;
    for (int64_t c = 0; c < d; ++c) y[c] = average.out[i * d + c] / average.sum[i];
    if (!args.lse.empty()) {
      args.lse.as<float>()[(s.batch * args.Hq + h) * T + token] =
          average.largest[i] + std::log(average.sum[i]);
    }
  }
}

// Probabilities and the gradient of the products, of a block of queries with a block of keys; to
// scratch.scores and scratch.d_scores.
void backward_scores(const AttentionBackwardArgs& args, const float* y_dot_d_y, const Sequence& s,
                     int64_t h, int64_t q0, int64_t queries, int64_t k0, int64_t keys,
                     const BlockScratch& scratch) {
  const ScoreBlock products = scores(args, s, h, q0, queries, k0, keys, scratch.scores);
  gemm_serial({.transpose_b = true,
               .M = queries,
               .N = keys,
               .K = args.d,
               .a = token_row(args.d_y, s.batch, s.first + q0) + h * args.d,
               .lda = token_stride(args.d_y),
               .b = s.v + k0 * s.kv_stride + h / (args.Hq / args.Hkv) * args.d,
               .ldb = s.kv_stride,
               .c = scratch.d_scores,
               .ldc = kKeys});
  const int64_t T = args.qkv.dim(1), head_row = (s.batch * args.Hq + h) * T;
  // y_dot_d_y is (B, T, Hq) like y; the kernel wants the tokens of one head.
  for (int64_t i = 0; i < queries; ++i) {
    scratch.sum[i] = y_dot_d_y[(s.batch * T + s.first + q0 + i) * args.Hq + h];
  }
  HWY_DYNAMIC_DISPATCH(score_gradient)
  (products, scratch.d_scores, args.lse.as<float>() + head_row + s.first + q0, scratch.sum);
}

// d_k and d_v of a block of keys: sums over the query heads that share them, and later queries.
void backward_keys(const AttentionBackwardArgs& args, const float* y_dot_d_y, const Block& block,
                   int64_t kv_head, const BlockScratch& scratch) {
  const Sequence& s = block.sequence;
  const int64_t group = args.Hq / args.Hkv;
  float* const d_row = token_row(args.d_qkv, s.batch, s.first + block.first);
  Gemm d_v{.transpose_a = true,
           .M = block.size,
           .N = args.d,
           .a = scratch.scores,
           .lda = kKeys,
           .ldb = token_stride(args.d_y),
           .c = d_row + (args.Hq + args.Hkv + kv_head) * args.d,
           .ldc = token_stride(args.d_qkv)};
  Gemm d_k = d_v;
  d_k.a = scratch.d_scores;
  d_k.ldb = token_stride(args.qkv);
  d_k.c = d_row + (args.Hq + kv_head) * args.d;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    for (int64_t q0 = block.first; q0 < s.tokens; q0 += kQueries) {
      const int64_t queries = std::min(kQueries, s.tokens - q0);
      backward_scores(args, y_dot_d_y, s, h, q0, queries, block.first, block.size, scratch);
      d_v.K = d_k.K = queries;
      d_v.b = token_row(args.d_y, s.batch, s.first + q0) + h * args.d;
      d_k.b = token_row(args.qkv, s.batch, s.first + q0) + h * args.d;
      gemm_serial(d_v);
      gemm_serial(d_k);
      d_v.beta = d_k.beta = 1.0f;
    }
  }
}

// d_q of a block of queries: a sum over the keys that they see.
void backward_queries(const AttentionBackwardArgs& args, const float* y_dot_d_y, const Block& block,
                      int64_t h, const BlockScratch& scratch) {
  const Sequence& s = block.sequence;
  const int64_t end = block.first + block.size;
  for (int64_t k0 = 0; k0 < end; k0 += kKeys) {
    const int64_t keys = std::min(kKeys, end - k0);
    backward_scores(args, y_dot_d_y, s, h, block.first, block.size, k0, keys, scratch);
    gemm_serial({.M = block.size,
                 .N = args.d,
                 .K = keys,
                 .a = scratch.d_scores,
                 .lda = kKeys,
                 .b = s.k + k0 * s.kv_stride + h / (args.Hq / args.Hkv) * args.d,
                 .ldb = s.kv_stride,
                 .beta = k0 > 0 ? 1.0f : 0.0f,
                 .c = token_row(args.d_qkv, s.batch, s.first + block.first) + h * args.d,
                 .ldc = token_stride(args.d_qkv)});
  }
}

// Calls task(block, head, scratch) for all blocks and heads.
template <typename Task>
void for_blocks(Context& ctx, const std::vector<Block>& blocks, int64_t heads, int64_t d,
                Task&& task) {
  ScratchScope scope(ctx.scratch);
  float* const base = scope.take<float>(BlockScratch::floats(d) * ctx.threads.size()).data();
  const int64_t n = static_cast<int64_t>(blocks.size()) * heads;
  ctx.threads.parallel_for(n, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      task(blocks[static_cast<size_t>(i / heads)], i % heads, BlockScratch(base, d, thread));
    }
  });
}

// y.d_y of every token and head, (B, T, Hq).
void token_dots(Context& ctx, const AttentionBackwardArgs& args, float* out) {
  const int64_t T = args.y.dim(1);
  ctx.threads.parallel_for(args.y.dim(0) * T, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      HWY_DYNAMIC_DISPATCH(row_dots)
      (token_row(args.y, i / T, i % T), token_row(args.d_y, i / T, i % T), args.Hq, args.d,
       out + i * args.Hq);
    }
  });
}

// y = the average over the parts of one query head, which are `stride` rows apart.
void join(const Average& parts, int64_t first, int64_t count, int64_t stride, float* y) {
  float largest = parts.largest[first];
  for (int64_t i = 1; i < count; ++i) {
    largest = std::max(largest, parts.largest[first + i * stride]);
  }
  std::fill(y, y + parts.d, 0.0f);
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i * stride;
    const float weight = std::exp(parts.largest[row] - largest);
    sum += weight * parts.sum[row];
    for (int64_t c = 0; c < parts.d; ++c) y[c] += weight * parts.out[row * parts.d + c];
  }
  for (int64_t c = 0; c < parts.d; ++c) y[c] /= sum;
}

}  // namespace

void attention(Context& ctx, const AttentionArgs& args) {
  std::vector<Sequence> sequences = sequences_of(args);
  if (!args.cache.k.empty()) move_to_cache(ctx, args, sequences);
  for_blocks(ctx, split(sequences, kQueries, true), args.Hq, args.d,
             [&](const Block& block, int64_t h, const BlockScratch& scratch) {
               forward_block(args, block, h, scratch);
             });
}

void attention_backward(Context& ctx, const AttentionBackwardArgs& args) {
  const std::vector<Sequence> sequences = sequences_of(args);
  ScratchScope scope(ctx.scratch);
  float* const dots = scope.take<float>(args.y.dim(0) * args.y.dim(1) * args.Hq).data();
  token_dots(ctx, args, dots);
  for_blocks(ctx, split(sequences, kKeys, false), args.Hkv, args.d,
             [&](const Block& block, int64_t kv_head, const BlockScratch& scratch) {
               backward_keys(args, dots, block, kv_head, scratch);
             });
  for_blocks(ctx, split(sequences, kQueries, true), args.Hq, args.d,
             [&](const Block& block, int64_t h, const BlockScratch& scratch) {
               backward_queries(args, dots, block, h, scratch);
             });
}

void attention_step(Context& ctx, const AttentionArgs& args) {
  std::vector<Sequence> sequences = sequences_of(args);
  move_to_cache(ctx, args, sequences);
  const int64_t B = args.qkv.dim(0), Hq = args.Hq, Hkv = args.Hkv, d = args.d, group = Hq / Hkv;
  int64_t longest = 0;
  for (const Sequence& s : sequences) longest = std::max(longest, s.past + 1);
  const int64_t parts = blocks_of(longest, kStepKeys);
  // Row (b, part, query head) of the averages.
  ScratchScope scope(ctx.scratch);
  const Average averages{.largest = scope.take<float>(B * parts * Hq).data(),
                         .sum = scope.take<float>(B * parts * Hq).data(),
                         .out = scope.take<float>(B * parts * Hq * d).data(),
                         .d = d};
  ctx.threads.parallel_for(B * parts * Hkv, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (parts * Hkv), part = i / Hkv % parts, kv_head = i % Hkv;
      const Sequence& s = sequences[static_cast<size_t>(b)];
      const int64_t k0 = part * kStepKeys, keys = std::min(kStepKeys, s.past + 1 - k0);
      if (keys <= 0) continue;
      const int64_t row = (b * parts + part) * Hq + kv_head * group;
      HWY_DYNAMIC_DISPATCH(step_part)
      ({.q = token_row(args.qkv, b, 0) + kv_head * group * d,
        .k = s.k + k0 * s.kv_stride + kv_head * d,
        .v = s.v + k0 * s.kv_stride + kv_head * d,
        .heads = group,
        .d = d,
        .keys = keys,
        .kv_stride = s.kv_stride,
        .scale = score_scale(d),
        .average = {averages.largest + row, averages.sum + row, averages.out + row * d, d}});
    }
  });
  ctx.threads.parallel_for(B * Hq, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / Hq, h = i % Hq;
      const int64_t count = blocks_of(sequences[static_cast<size_t>(b)].past + 1, kStepKeys);
      join(averages, b * parts * Hq + h, count, Hq, token_row(args.y, b, 0) + h * d);
    }
  });
}

}  // namespace mamba3::cpu

#endif
