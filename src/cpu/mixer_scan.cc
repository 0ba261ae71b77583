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

void scan_head(const MixerScanArgs& args, const MixerWeights& w, const MixerTokens& terms,
               const MixerSequence& sequence, int64_t h, const ChunkScratch& scratch) {
  const MixerShape& s = args.shape;
  Chunk chunk{.s = s,
              .w = w,
              .terms = terms,
              .proj_view = args.proj,
              .sequence = sequence,
              .h = h,
              .m = scratch};
  if (sequence.T == 0) return;
  chunk.begin_sequence(args.state);
  for (int64_t t = 0; t < sequence.T; t += scratch.Q) {
    chunk.prepare(t);
    chunk.scores(scratch.weights);
    chunk.weights(scratch.weights, scratch.weights);
    chunk.outputs();
    for (int64_t i = 0; i < chunk.Q; ++i) {
      const float* z = chunk.proj(i) + s.z() + h * s.P;
      float* y = token_row(args.y, sequence.token + t + i) + h * s.P;
      for (int64_t r = 0; r < s.R; ++r) gate(s, w, h, r, z, scratch.y.row(i * s.R + r), y);
    }
    chunk.advance_state();
  }
  chunk.end_sequence(args.state);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(scan_tokens);
HWY_EXPORT(scan_head);

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
  const int64_t floats = ChunkScratch(s, Q).floats;
  const auto scratch = scope.take<float>(floats * ctx.threads.size());
  std::fill(scratch.begin(), scratch.end(), 0.0f);
  const int64_t tasks = static_cast<int64_t>(sequences.size()) * s.H;
  ctx.threads.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      HWY_DYNAMIC_DISPATCH(scan_head)
      (args, weights, terms, sequences[i / s.H], i % s.H,
       ChunkScratch(s, Q, scratch.data() + thread * floats));
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
