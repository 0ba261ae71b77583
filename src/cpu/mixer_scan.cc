#include "ops/mixer_scan.h"

#include <algorithm>

#include "cpu/mixer.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/mixer_scan.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/mixer_chunk-inl.h"

// The schedule: tasks are (sequence, head); a task walks its chunks in order and keeps everything
// of a chunk in the caches. See cpu/mixer_chunk-inl.h for the algorithm of a chunk.

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

void scan_tokens(const MixerScanArgs& args, const MixerWeights& w, const MixerTokens& terms,
                 int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    token_terms(args.shape, w, token_row(args.proj, token), token, terms);
  }
}

// Heads [first, last) of one sequence. All of them take a chunk before any takes the next one: the
// chunk's B and C, which the heads share, and its pages stay in the cache.
void scan_heads(const MixerScanArgs& args, const MixerWeights& w, const MixerTokens& terms,
                const MixerSequence& sequence, int64_t first, int64_t last,
                const ChunkScratch& scratch) {
  const MixerShape& s = args.shape;
  const auto chunk_of = [&](int64_t h, const ChunkScratch& mine) HWY_ATTR {
    return Chunk{.s = s,
                 .w = w,
                 .terms = terms,
                 .proj_view = args.proj,
                 .sequence = sequence,
                 .h = h,
                 .m = mine};
  };
  for (int64_t t = 0; t < sequence.T; t += scratch.Q) {
    for (int64_t h = first; h < last; ++h) {
      const ChunkScratch mine = scratch.of_head(h - first, s.N);
      Chunk chunk = chunk_of(h, mine);
      if (t == 0) chunk.begin_sequence(args.state);
      chunk.prepare(t);
      chunk.scores(mine.weights);
      chunk.weights(mine.weights, mine.weights);
      chunk.outputs();
      for (int64_t i = 0; i < chunk.Q; ++i) {
        const float* z = chunk.proj(i) + s.z() + h * s.P;
        float* y = token_row(args.y, sequence.token + t + i) + h * s.P;
        for (int64_t r = 0; r < s.R; ++r) gate(s, w, h, r, z, mine.y.row(i * s.R + r), y);
      }
      chunk.advance_state();
      if (t + chunk.Q == sequence.T) chunk.end_sequence(args.state);
    }
  }
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(scan_tokens);
HWY_EXPORT(scan_heads);

void mixer_scan(Context& ctx, const MixerScanArgs& args) {
  const MixerShape& s = args.shape;
  const int64_t tokens = args.proj.dim(0) * args.proj.dim(1);
  const MixerWeights weights(args.params);
  const auto sequences = mixer_sequences(args.proj, args.cu_seqlens);
  ScratchScope scope(ctx.scratch);
  const MixerTokens terms(s, tokens, scope);
  ctx.threads.parallel_for(tokens, 32, [&](int64_t begin, int64_t end, int) {
    HWY_DYNAMIC_DISPATCH(scan_tokens)(args, weights, terms, begin, end);
  });
  const int64_t Q = std::min(args.chunk ? args.chunk : mixer_scan_chunk(s.R), args.proj.dim(1));
  const int64_t count = static_cast<int64_t>(sequences.size());
  if (count == 0) return;
  // Two tasks a thread, so that a slow one can be made up for.
  const int64_t blocks = std::clamp<int64_t>(2 * ctx.threads.size() / count, 1, s.H);
  const int64_t heads = (s.H + blocks - 1) / blocks;
  const int64_t floats = ChunkScratch(s, Q, heads).floats;
  const auto scratch = scope.take<float>(floats * ctx.threads.size());
  std::fill(scratch.begin(), scratch.end(), 0.0f);
  ctx.threads.parallel_for(count * blocks, 1, [&](int64_t begin, int64_t end, int thread) {
    const ChunkScratch mine(s, Q, heads, scratch.data() + thread * floats);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task % blocks;
      HWY_DYNAMIC_DISPATCH(scan_heads)
      (args, weights, terms, sequences[task / blocks], block * s.H / blocks,
       (block + 1) * s.H / blocks, mine);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
