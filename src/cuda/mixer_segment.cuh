#pragma once

// The parallel form of the Mamba-3 scan, for the forward and the backward (see
// cpu/mixer_chunk-inl.h for the equations).
//
// Sequences are cut into chunks of Q tokens, which are numbered through all sequences. A segment is
// as many consecutive chunks as keep their scratch within bounds; the host takes segments in order
// and hands the state of the sequence that is cut from one to the next. All chunks of a segment are
// worked on at once:
//   1. terms of tokens (rstd of B and C, theta) and of heads (dt, gamma, scale, decays)
//   2. angles: sums within a chunk, then a walk over the chunks of a sequence
//   3. keys, queries and values of every head, written to scratch
//   4. what each chunk adds to the state, then a walk that turns it into the state before it
//   5. weights W and outputs y
// The walks are serial along time and parallel over the elements of the state. The number of a
// chunk and its sums depend on its sequence alone, so results do not depend on what else is in the
// batch, nor on the size of a segment.

#include "cuda/mixer.cuh"
#include "cuda/tile_product.cuh"

namespace mamba3::cuda {

// A chunk of up to Q tokens of one sequence.
struct MixerChunk {
  int batch;   // of the views (B, T, ..)
  int start;   // position of its first token there
  int tokens;  // 0: there is no such chunk
  int sequence;
  bool first, last;  // of its sequence
};

// The rows of a view (B, T, columns).
template <typename T>
struct MixerRows {
  T* data;
  int64_t batch_stride, token_stride;

  explicit MixerRows(const View& view)
      : data(cuda::data<T>(view)), batch_stride(view.stride(0)), token_stride(view.stride(1)) {}
  __device__ T* at(const MixerChunk& chunk, int t) const {
    return data + chunk.batch * batch_stride + (int64_t{chunk.start} + t) * token_stride;
  }
};

// Kernels that list chunks or spans are one block, whose threads take a range of sequences each.
constexpr int kListThreads = 1024;

// The sum of `mine` over the threads of that block before this one.
__device__ inline int sum_of_earlier_threads(int mine) {
  __shared__ int sums[kListThreads];
  const int thread = static_cast<int>(threadIdx.x);
  sums[thread] = mine;
  __syncthreads();
  for (int distance = 1; distance < kListThreads; distance *= 2) {
    const int before = thread >= distance ? sums[thread - distance] : 0;
    __syncthreads();
    sums[thread] += before;
    __syncthreads();
  }
  return sums[thread] - mine;
}

// All chunks of a batch, in device memory.
struct MixerChunks {
  const MixerChunk* chunks;
  const int32_t* offsets;  // (sequences + 1) number of the first chunk of each sequence
  int64_t count;           // an upper bound when sequences are packed
  int64_t sequences;
  int64_t per_sequence;  // 0 when packed
};

// What the state of the sequence that goes on is between two segments.
struct MixerCarry {
  float* ssm;    // (H, P, N)
  float* angle;  // (H, S)
};

// The scratch of a segment. M = Q R; rows are (t, r), and rows of absent tokens hold anything.
struct MixerSegment {
  MixerShape s;
  MixerWeights w;
  int Q, M;
  int sequences;
  int first, count;          // its chunks
  const MixerChunk* chunks;  // those
  const int32_t* offsets;    // as in MixerChunks

  float* theta;                           // (count, Q, S) see theta_of()
  float* rstd;                            // (count, Q, 2, R, G) of B, then C
  float *dt, *gamma, *scale, *c, *c_low;  // (count, H, Q)
  float* from_start;                      // (count, H, M) exp(c_t)
  float* to_end;                          // (count, H, M) exp(c_Q - c_t) scale_t
  float* angle;                           // (count, H, Q, S) from the start of the chunk
  float* start_angle;                     // (count, H, S)
  float *q, *k;                           // (count, H, M, N)
  float *v, *y;                           // (count, H, M, P) y before norm and gate
  float* state;                           // (count, H, P, N) before the chunk
  float* weights;                         // (count, H, M, M)
  float* scores;                          // the same, q k^T; null unless wanted

  // Of a chunk, counted from the segment's first, and head h: an index of the arrays (count, H).
  __device__ int64_t at(int chunk, int h) const { return int64_t{chunk} * s.H + h; }
  // exp(c_Q): what is left of the state at the end of the chunk.
  __device__ float decay(int chunk, int h) const {
    return from_start[at(chunk, h) * M + (chunks[chunk].tokens - 1) * s.R];
  }
  // The keys that some row of the tile from row0 sees are [0, end).
  __device__ int visible_end(int row0, int rows) const {
    const int R = static_cast<int>(s.R);
    return min(rows, ((row0 + kTile - 1) / R + 1) * R);
  }

  // Calls walk(sequence, begin, end, starts, ends) for the share of blockIdx.y of the sequences of
  // the segment: their chunks are [begin, end) of the segment, and they start or end there.
  template <typename Walk>
  __device__ void for_sequences(const Walk& walk) const {
    const int limit = first + count;
    for (int i = chunks[0].sequence + static_cast<int>(blockIdx.y);
         i < sequences && offsets[i] < limit; i += static_cast<int>(gridDim.y)) {
      const int begin = offsets[i], end = offsets[i + 1];
      if (begin == end || end <= first) continue;
      walk(i, max(begin, first) - first, min(end, limit) - first, begin >= first, end <= limit);
    }
  }
};

// Blocks (c, h) or (c, h, ...) are blockIdx.x = c * H + h.
struct ChunkHead {
  int c, h;
  __device__ explicit ChunkHead(const MixerShape& s)
      : c(static_cast<int>(blockIdx.x / static_cast<unsigned>(s.H))),
        h(static_cast<int>(blockIdx.x % static_cast<unsigned>(s.H))) {}
};

MixerChunks list_chunks(Context& ctx, const char* op, const View& proj, const View& cu_seqlens,
                        int64_t Q, ScratchScope& scope);

// A segment without scratch.
MixerSegment empty_segment(const MixerShape& shape, const MixerParams& params,
                           const MixerChunks& chunks, int64_t Q);
// Scratch for segments of up to `count` chunks.
MixerSegment take_segment(const MixerShape& shape, const MixerParams& params,
                          const MixerChunks& chunks, int64_t count, int64_t Q, bool with_scores,
                          ScratchScope& scope);
MixerCarry take_carry(const MixerShape& shape, ScratchScope& scope);
// Sets the segment to chunks from `first` on, `count` at most.
void move_segment(MixerSegment& segment, const MixerChunks& chunks, int64_t first, int64_t count);
// How many blocks walk the sequences of a segment side by side.
unsigned walks_of(const MixerSegment& segment, const MixerChunks& chunks);

// Steps 1 to 4. The state of a sequence begins from its row of the pool, or zero without one; where
// the segment begins inside a sequence, from `in`. It goes to `out` if the sequence goes on, and
// with `finish` back to the pool where it ends.
void segment_states(Context& ctx, const char* op, const MixerSegment& segment,
                    const MixerChunks& chunks, const View& proj, const MixerState& pool,
                    const MixerCarry& in, const MixerCarry& out, bool finish, bool with_q);
// Step 5.
void segment_outputs(Context& ctx, const char* op, const MixerSegment& segment);
// out (count, H, P, N) = sum over the rows j of a chunk of scale_j a_j b_j^T, with a (count, H, M,
// P), b (count, H, M, N) and scale (count, H, M).
void segment_outer_products(Context& ctx, const char* op, const MixerSegment& segment,
                            const float* a, const float* b, const float* scale, float* out);

}  // namespace mamba3::cuda
