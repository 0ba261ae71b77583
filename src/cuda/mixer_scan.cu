#include <algorithm>

#include "cuda/mixer_tiles.cuh"
#include "cuda/mixer_walk.cuh"
#include "ops/mixer_scan.h"
#include "ops/packed.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;

// out = sum_r mimo_o * norm(y_r) * silu(z * mimo_z): a warp for every token and head.
template <typename T>
__global__ void gate(MixerSegment m, MixerRows<const T> proj, MixerRows<T> out) {
  MAMBA3_DYNAMIC_SHARED(float, shared);
  const MixerShape& s = m.s;
  const int H = static_cast<int>(s.H), P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t index = int64_t{blockIdx.x} * (kThreads / kWarp) + warp;  // (c, t, h)
  const int h = static_cast<int>(index % H);
  const int c = static_cast<int>(index / H / m.Q), t = static_cast<int>(index / H % m.Q);
  if (c >= m.count) return;
  const MixerChunk chunk = m.chunks[c];
  if (t >= chunk.tokens) return;
  const float* y = m.y + (m.at(c, h) * m.M + t * R) * P;
  float* rstd = shared + warp * R;
  if (m.w.norm) {
    for (int r = 0; r < R; ++r) {
      float sum = 0;
      for (int p = lane; p < P; p += kWarp) sum = fmaf(y[r * P + p], y[r * P + p], sum);
      sum = warp_sum(sum);
      if (lane == 0) rstd[r] = rsqrtf(sum / static_cast<float>(P) + s.eps);
    }
    __syncwarp();
  }
  const T* z = proj.at(chunk, t) + s.z() + h * P;
  T* to = out.at(chunk, t) + h * P;
  for (int p = lane; p < P; p += kWarp) {
    const float z_p = to_float(z[p]);
    float sum = 0;
    for (int r = 0; r < R; ++r) {
      const int i = (h * R + r) * P + p;
      float y_r = y[r * P + p];
      if (m.w.norm) y_r *= rstd[r] * m.w.norm[h * P + p];
      if (m.w.mimo_o) y_r *= m.w.mimo_o[i];
      sum = fmaf(y_r, silu(m.w.mimo_z ? z_p * m.w.mimo_z[i] : z_p), sum);
    }
    to[p] = from_float<T>(sum);
  }
}

// k_prev and v_prev of the sequences that end in the segment: blockIdx.y is the chunk.
template <typename T>
__global__ void finish_sequences(MixerSegment m, MixerRows<const T> proj, float* k_prev,
                                 float* v_prev, const int32_t* rows) {
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.y);
  const MixerChunk chunk = m.chunks[c];
  if (!chunk.last) return;
  const int64_t row = rows[chunk.sequence];
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index < s.R * s.H * s.N) {  // (r, h, n)
    const int64_t r = index / (s.H * s.N), n = index % s.N;
    const int h = static_cast<int>(index / s.N % s.H);
    const int64_t from = m.at(c, h) * m.M + (chunk.tokens - 1) * s.R + r;
    k_prev[row * s.R * s.H * s.N + index] = m.k[from * s.N + n];
  }
  if (index < s.H * s.P) {
    v_prev[row * s.H * s.P + index] = to_float(proj.at(chunk, chunk.tokens - 1)[s.x() + index]);
  }
}

}  // namespace

void mixer_scan(Context& ctx, const MixerScanArgs& args) {
  constexpr const char* kOp = "mixer_scan";
  const MixerShape& s = args.shape;
  if (args.schedule == MixerSchedule::best &&
      mixer_scan_has_tiles(s, args.proj, args.y, args.chunk)) {
    return mixer_scan_tiles(ctx, args);
  }
  const int64_t sequences = sequence_count(args.proj, args.cu_seqlens);
  if (walks(ctx, s, args.schedule, sequences, {args.proj, args.y}, /*backward=*/false)) {
    return mixer_scan_walk(ctx, args, sequences);
  }
  const int64_t Q = mixer_scan_chunk(s, args.chunk, args.proj.dim(1));
  ScratchScope scope(ctx.scratch);
  const MixerChunks chunks = list_chunks(ctx, kOp, args.proj, args.cu_seqlens, Q, scope);
  if (chunks.count == 0) return;
  const int64_t size = std::min(chunks.count, mixer_scan_segment(s, Q, false));
  MixerSegment segment = take_segment(s, args.params, chunks, size, Q, false, scope);
  MixerCarry in = take_carry(s, scope), out = take_carry(s, scope);
  for (int64_t first = 0; first < chunks.count; first += size) {
    move_segment(segment, chunks, first, size);
    segment_states(ctx, kOp, segment, chunks, args.proj, args.state, in, out, true, true);
    segment_outputs(ctx, kOp, segment);
    visit_activation(args.proj.dtype, [&]<typename T>() {
      const MixerRows<const T> proj(args.proj);
      launch(ctx, kOp, gate<T>,
             {.blocks = blocks_for(int64_t{segment.count} * Q * s.H, kThreads / kWarp),
              .threads = kThreads,
              .shared_bytes = static_cast<size_t>(s.R) * (kThreads / kWarp) * sizeof(float)},
             segment, proj, MixerRows<T>(args.y));
      if (!args.state.empty()) {
        launch(ctx, kOp, finish_sequences<T>,
               {.blocks = {blocks_for(std::max(s.R * s.H * s.N, s.H * s.P), kThreads),
                           static_cast<unsigned>(segment.count)},
                .threads = kThreads},
               segment, proj, data<float>(args.state.k_prev), data<float>(args.state.v_prev),
               data<int32_t>(args.state.rows));
      }
    });
    std::swap(in, out);
  }
}

}  // namespace mamba3::cuda
