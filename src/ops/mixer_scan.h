#pragma once

#include "ops/mixer.h"

namespace mamba3 {

// How the GPU goes through time. Results agree to rounding.
enum class MixerSchedule : uint8_t {
  best,    // what is fastest
  chunks,  // many chunks of a sequence at once, by the kernels that take every shape
  walk,    // a thread block walks a head of a sequence, where it can; else as `chunks`
};

// The Mamba-3 mixer between in_proj and out_proj over whole sequences: B/C norm, bias, rotation,
// exponential-trapezoidal scan (paper, Prop. 1 and 4), D skip, optional norm, gate, MIMO up and
// down. Any T from 1 up, including sequences of length 0 in a packed batch.
struct MixerScanArgs {
  MixerShape shape;
  MixerParams params;
  View proj;  // (B, T, d_proj) f32, the output of in_proj; time and batch may be strided;
              // on the GPU also bf16
  View y;     // (B, T, H P) in the dtype of proj
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
  // Read as the initial and overwritten with the final state; empty: start from zero.
  MixerState state = {};
  // Tokens of a chunk; 0: the implementation's choice. Results agree to rounding.
  int64_t chunk = 0;
  MixerSchedule schedule = MixerSchedule::best;
};

// Recomputes what it needs from proj; nothing else is kept by the forward.
struct MixerScanBackwardArgs {
  MixerShape shape;
  MixerParams params;
  View proj;  // as in the forward
  View cu_seqlens = {};
  MixerState initial = {};  // the state before the forward (not overwritten); empty: zero
  View d_y;                 // (B, T, H P) in the dtype of proj
  View d_proj;              // (B, T, d_proj) in the dtype of proj, overwritten
  MixerParams d_params;     // accumulated into
  // In: the gradient of the final state; out: that of the initial state, all f32. Empty: zero and
  // not wanted.
  MixerState d_state = {};
  int64_t chunk = 0;
  int64_t heads = 0;  // as in mixer_scan_backward_heads(). Results agree to rounding
  MixerSchedule schedule = MixerSchedule::best;
};

// Tokens of a chunk for rank R when the caller does not choose (64/R rows as in the paper, at least
// 8).
int64_t mixer_scan_chunk(int64_t R);
// The tokens of a chunk on the GPU, where a chunk that the caller chooses has at most 256 rows.
int64_t mixer_scan_chunk(const MixerShape& shape, int64_t chunk, int64_t T);
// The chunks that the GPU takes at a time: as many as keep their scratch (keys, queries, values,
// states and weights of every head) within 256 MiB, at least one.
int64_t mixer_scan_segment(const MixerShape& shape, int64_t Q, bool backward);

// Whether the GPU's kernels on tensor cores take this: a published mixer in bf16 (rows at multiples
// of 16 bytes), N 64 or 128, P a multiple of 64, S 0, N/4 or N/2, SISO, or MIMO with S > 0 and R 2,
// 4 or 8, chunks of 64/R tokens or of any size. All else is left to kernels that take every shape.
bool mixer_scan_has_tiles(const MixerShape& shape, const View& proj, const View& y, int64_t chunk);
// The heads (of 64 channels, of one group) of a chunk that a thread block of the backward of those
// takes one after the other, adding up their gradients of keys and queries in bf16, where there are
// `count` chunks and the GPU holds `slots` thread blocks at a time: 1, 2 or 4, or `heads` if that
// is not 0 and divides those of a group.
int64_t mixer_scan_backward_heads(const MixerShape& shape, int64_t heads, int64_t count,
                                  int64_t slots);
// The chunks that that backward takes at a time: whole sequences of `per_sequence` chunks (0: not
// known) where a few of them keep its scratch within 1.25 GiB, else what does.
int64_t mixer_scan_tiles_segment(const MixerShape& shape, int64_t heads, int64_t count,
                                 int64_t per_sequence);
// Chunks that a thread block of those walks, where `blocks` heads (of 64 channels) have `count`
// chunks each, `per_sequence` for a sequence (0: not known), and the GPU holds `slots` of them at a
// time. Shorter walks fill the GPU, but several for a sequence need a pass more.
int64_t mixer_scan_span(int64_t count, int64_t per_sequence, int64_t blocks, int64_t slots);

// Whether thread blocks of the GPU walk the heads of `sequences` sequences, each of which needs
// `bytes` of the `shared_memory` of a block: where there are two for every multiprocessor and they
// are small (N P <= 2048; with larger ones it is not known to be faster), or where the schedule
// asks for it.
bool mixer_scan_walks(const MixerShape& shape, MixerSchedule schedule, int64_t sequences,
                      int64_t multiprocessors, int64_t bytes, int64_t shared_memory);
// The tokens of a chunk there: at most 32 rows.
int64_t mixer_scan_walk_chunk(int64_t R, int64_t chunk);
// The sequences of T tokens (packed: of T tokens together) that the backward of those takes at a
// time: as many as keep its scratch within 1.25 GiB, at least one. Packed ones are taken together;
// 0: that is too much.
int64_t mixer_scan_walk_batch(const MixerShape& shape, int64_t Q, int64_t sequences, int64_t T,
                              bool packed);

void mixer_scan(Context& ctx, const MixerScanArgs& args);
void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args);

namespace cpu {
void mixer_scan(Context& ctx, const MixerScanArgs& args);
void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void mixer_scan(Context& ctx, const MixerScanArgs& args);
void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
