#pragma once

#include "ops/delta.h"

namespace mamba3 {

// The Gated DeltaNet mixer of ops/delta.h over whole sequences, by the chunked form of its section
// 3.3. Any T from 1 up, including sequences of length 0 in a packed batch.
struct DeltaScanArgs {
  DeltaShape shape;
  DeltaParams params;
  View proj;             // (B, T, d_proj) f32; time and batch may be strided; on the GPU also bf16
  View y;                // (B, T, H V) in the dtype of proj
  View cu_seqlens = {};  // (n+1) i32, or empty: B = 1, and sequence i is positions [cu[i], cu[i+1])
  // Read as the initial and overwritten with the final state; empty: start from zero.
  DeltaState state = {};
  // Tokens of a chunk, on the GPU 16 at most; 0: the implementation's choice. Results agree to
  // rounding.
  int64_t chunk = 0;
};

// Of a scan that started from zero. Recomputes what it needs from proj; nothing else is kept by the
// forward.
struct DeltaScanBackwardArgs {
  DeltaShape shape;
  DeltaParams params;
  View proj;  // as in the forward
  View cu_seqlens = {};
  View d_y;              // (B, T, H V) in the dtype of proj
  View d_proj;           // (B, T, d_proj) in the dtype of proj, overwritten
  DeltaParams d_params;  // accumulated into
  int64_t chunk = 0;
};

// Tokens of a chunk when the caller does not choose.
int64_t delta_scan_chunk(Device device);
// The thread blocks that the GPU takes at a time for `tasks` heads of sequences, where each needs
// so many floats of scratch: as many as keep it within 512 MiB, at least one. A block takes one
// task after the other.
int64_t delta_scan_blocks(int64_t tasks, int64_t floats);

void delta_scan(Context& ctx, const DeltaScanArgs& args);
void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args);

namespace cpu {
void delta_scan(Context& ctx, const DeltaScanArgs& args);
void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args);
}  // namespace cpu
namespace cuda {
void delta_scan(Context& ctx, const DeltaScanArgs& args);
void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args);
}  // namespace cuda

}  // namespace mamba3
