#include "ops/mixer_scan.h"

#include <algorithm>
#include <cmath>

#include "ops/packed.h"

namespace mamba3 {

int64_t mixer_scan_chunk(int64_t R) {
  return std::max<int64_t>(8, 64 / R);
}

int64_t mixer_scan_chunk(const MixerShape& s, int64_t chunk, int64_t T) {
  constexpr int64_t kRows = 256;
  const int64_t Q =
      chunk > 0 ? std::min(chunk, std::max<int64_t>(1, kRows / s.R)) : mixer_scan_chunk(s.R);
  return std::clamp<int64_t>(Q, 1, std::max<int64_t>(1, T));
}

int64_t mixer_scan_segment(const MixerShape& s, int64_t Q, bool backward) {
  constexpr int64_t kFloats = int64_t{64} << 20;  // 256 MiB
  constexpr int64_t kChunks = 32768;              // a dimension of a grid holds them
  const int64_t M = Q * s.R;
  const int64_t forward_floats = 2 * M * s.N + 2 * M * s.P + M * M + s.P * s.N + Q * s.S;
  const int64_t backward_floats = 2 * M * s.N + 2 * M * s.P + 2 * M * M + s.P * s.N + Q * s.S;
  const int64_t floats = s.H * (forward_floats + (backward ? backward_floats : 0));
  return std::clamp<int64_t>(kFloats / floats, 1, kChunks);
}

bool mixer_scan_has_tiles(const MixerShape& s, const View& proj, const View& y, int64_t chunk) {
  const auto aligned = [](const View& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
           (rows.dim(0) == 1 || rows.stride(0) % 8 == 0) &&
           (rows.dim(1) == 1 || rows.stride(1) % 8 == 0);
  };
  const bool siso = !s.mimo && s.R == 1 && (s.S == 0 || s.rope_pairs == RopePairs::neighbours);
  const bool mimo =
      s.mimo && (s.R == 2 || s.R == 4 || s.R == 8) && s.S > 0 && s.rope_pairs == RopePairs::halves;
  return s.is_published() && proj.dtype == DType::bf16 && aligned(proj) && aligned(y) &&
         (siso || mimo) && (s.N == 64 || s.N == 128) &&
         (s.S == 0 || s.S == s.N / 4 || s.S == s.N / 2) && s.P % 64 == 0 &&
         (!s.out_norm || s.P == 64) && (chunk == 0 || chunk == 64 / s.R);
}

int64_t mixer_scan_tiles_segment(const MixerShape& s, int64_t heads, int64_t count,
                                 int64_t per_sequence) {
  constexpr int64_t kBytes = int64_t{5} << 28;
  constexpr int64_t kRows = 64;
  // A state and its gradient, and the gradients of keys, queries and angles, in bf16; and of MIMO's
  // parameters in f32.
  const int64_t bytes = 2 * s.H * (2 * s.P * s.N + kRows * (s.P / 64) * (2 * s.N + s.S) / heads) +
                        (s.mimo ? 4 * s.H * s.R * (2 * s.N * (s.P / 64) + 3 * s.P) : 0);
  const int64_t most = std::clamp<int64_t>(kBytes / bytes, 1, count);
  if (per_sequence > 0 && most >= per_sequence) return most / per_sequence * per_sequence;
  return most;
}

int64_t mixer_scan_backward_heads(const MixerShape& s, int64_t heads, int64_t count,
                                  int64_t slots) {
  const int64_t of_group = s.H / s.G * (s.P / 64);
  if (heads > 0) return of_group % heads == 0 ? heads : 1;
  constexpr double kBegin = 0.25;  // of the time of a head: to begin a thread block
  int64_t best = 1;
  double best_time = 0;
  for (int64_t each = 1; each <= 4 && of_group % each == 0; each *= 2) {
    const int64_t blocks = count * s.G * of_group / each;
    const double time =
        static_cast<double>((blocks + slots - 1) / slots) * (static_cast<double>(each) + kBegin);
    if (each == 1 || time < best_time) best = each, best_time = time;
  }
  return best;
}

int64_t mixer_scan_span(int64_t count, int64_t per_sequence, int64_t blocks, int64_t slots) {
  constexpr double kPass = 0.8;   // of the time of a walk: the pass that several spans need
  constexpr double kAlone = 0.7;  // of a full wave: one of a block a multiprocessor instead of two
  constexpr double kBegin = 1;    // chunks: to begin a walk
  const int64_t chunks = per_sequence > 0 ? per_sequence : count;
  const int64_t sequences = count / chunks;
  int64_t best = chunks;
  double best_time = 0;
  for (int64_t pieces = 1; pieces <= std::min<int64_t>(chunks, 64); ++pieces) {
    const int64_t length = (chunks + pieces - 1) / pieces, spans = (chunks + length - 1) / length;
    const double waves =
        static_cast<double>(sequences * spans * blocks) / static_cast<double>(slots);
    const double rest = waves - std::floor(waves);
    const double time = (static_cast<double>(length) + kBegin) *
                        (std::floor(waves) + (rest > 0.5 ? 1
                                              : rest > 0 ? kAlone
                                                         : 0)) *
                        (spans > 1 ? 1 + kPass : 1);
    if (pieces == 1 || time < best_time) best = length, best_time = time;
  }
  return best;
}

bool mixer_scan_walks(const MixerShape& s, MixerSchedule schedule, int64_t sequences,
                      int64_t multiprocessors, int64_t bytes, int64_t shared_memory) {
  const bool can = sequences > 0 && s.R <= 8 && s.N <= 128 && bytes <= shared_memory;
  const bool many = sequences * s.H >= 2 * multiprocessors, small = s.N * s.P <= 2048;
  return can &&
         (schedule == MixerSchedule::walk || (schedule == MixerSchedule::best && many && small));
}

int64_t mixer_scan_walk_chunk(int64_t R, int64_t chunk) {
  constexpr int64_t kRows = 32;
  const int64_t most = std::max<int64_t>(1, kRows / R);
  return chunk > 0 ? std::min(chunk, most) : most;
}

int64_t mixer_scan_walk_batch(const MixerShape& s, int64_t Q, int64_t sequences, int64_t T,
                              bool packed) {
  constexpr int64_t kFloats = int64_t{5} << 26;
  // The gradients of keys, queries and angles of every token, and the states between chunks.
  const int64_t rows = T * (2 * s.R * s.N + s.S);
  const int64_t chunks = T / Q + (packed ? sequences : 1);
  const int64_t floats = s.H * (rows + chunks * (s.P * s.N + 2 * s.S));
  if (packed) return floats <= kFloats ? sequences : 0;
  const int64_t most = std::clamp<int64_t>(kFloats / floats, 1, sequences);
  const int64_t batches = (sequences + most - 1) / most;
  return (sequences + batches - 1) / batches;
}

void mixer_scan(Context& ctx, const MixerScanArgs& args) {
  const Check check("mixer_scan", ctx);
  const MixerShape& s = args.shape;
  check_mixer_shape(check, s);
  check_mixer_params(check, s, args.params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()}, check.activation_types());
  check.tensor("y", args.y, {B, T, s.d_inner()}, {args.proj.dtype});
  check.disjoint("y", args.y, "proj", args.proj);
  const int64_t sequences = check_packed(check, args.proj, args.cu_seqlens);
  if (!args.state.empty()) check_mixer_state(check, s, args.state, sequences);
  check.that(args.chunk >= 0, "chunk must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::mixer_scan(ctx, args);
    case Device::cuda:
      return cuda::mixer_scan(ctx, args);
  }
}

void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args) {
  const Check check("mixer_scan_backward", ctx);
  const MixerShape& s = args.shape;
  check_mixer_shape(check, s);
  check_mixer_params(check, s, args.params);
  check_mixer_params(check, s, args.d_params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()}, check.activation_types());
  check.tensor("d_y", args.d_y, {B, T, s.d_inner()}, {args.proj.dtype});
  check.tensor("d_proj", args.d_proj, {B, T, s.d_proj()}, {args.proj.dtype});
  check.disjoint("d_proj", args.d_proj, "proj", args.proj);
  check.disjoint("d_proj", args.d_proj, "d_y", args.d_y);
  const int64_t sequences = check_packed(check, args.proj, args.cu_seqlens);
  if (!args.initial.empty()) check_mixer_state(check, s, args.initial, sequences);
  if (!args.d_state.empty()) {
    check_mixer_state(check, s, args.d_state, sequences);
    check.that(args.d_state.ssm.dtype == DType::f32, "d_state.ssm must be f32");
  }
  check.that(args.chunk >= 0, "chunk must not be negative");
  check.that(args.heads >= 0, "heads must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::mixer_scan_backward(ctx, args);
    case Device::cuda:
      return cuda::mixer_scan_backward(ctx, args);
  }
}

}  // namespace mamba3
