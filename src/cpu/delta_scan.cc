#include "ops/delta_scan.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/delta_scan.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/delta_chunk-inl.h"

// The schedule: a task is a head of a sequence, and walks its chunks in order.

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {

void delta_scan_head(const DeltaScanArgs& args, const DeltaWeights& w,
                     const MixerSequence& sequence, int64_t h, const DeltaScratch& m) {
  const DeltaShape& s = args.shape;
  if (sequence.T == 0) return;
  DeltaChunk chunk{.s = s, .w = w, .proj_view = args.proj, .sequence = sequence, .h = h, .m = m};
  chunk.begin_sequence(args.state);
  for (int64_t t = 0; t < sequence.T; t += m.Q) {
    chunk.prepare(t, true);
    chunk.weights(true);
    chunk.updates();
    chunk.outputs();
    for (int64_t i = 0; i < chunk.Q; ++i) {
      delta_gate(s, w, chunk.proj(i) + s.z() + h * s.V, m.o.row(i),
                 token_row(args.y, chunk.token(i)) + h * s.V);
    }
    chunk.advance_state();
  }
  chunk.end_sequence(args.state);
}

}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(delta_scan_head);

void delta_scan(Context& ctx, const DeltaScanArgs& args) {
  const DeltaShape& s = args.shape;
  const DeltaWeights weights(args.params);
  const auto sequences = mixer_sequences(args.proj, args.cu_seqlens);
  const int64_t chunk = args.chunk ? args.chunk : delta_scan_chunk(Device::cpu);
  const int64_t Q = std::clamp<int64_t>(chunk, 1, std::max<int64_t>(1, args.proj.dim(1)));
  const int64_t floats = DeltaScratch(s, Q, nullptr).floats;
  ScratchScope scope(ctx.scratch);
  const auto scratch = scope.take<float>(floats * ctx.threads.size());
  std::fill(scratch.begin(), scratch.end(), 0.0f);
  const int64_t tasks = static_cast<int64_t>(sequences.size()) * s.H;
  ctx.threads.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
    const DeltaScratch mine(s, Q, scratch.data() + thread * floats);
    for (int64_t task = begin; task < end; ++task) {
      HWY_DYNAMIC_DISPATCH(delta_scan_head)
      (args, weights, sequences[static_cast<size_t>(task / s.H)], task % s.H, mine);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
