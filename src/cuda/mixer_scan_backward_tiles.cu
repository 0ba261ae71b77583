// The backward of the Mamba-3 scan on tensor cores; see mixer_tiles.cuh. Nothing was kept by the
// forward. What comes in to each span is found for all of time, then segments of it are taken in
// reverse (for small batches there is one), each in these steps:
//
//   1. part_states(): the state S before each chunk, and by the same walk in reverse its gradient Z
//      after each chunk, rounded to bf16
//   2. chunk_backward(): all chunks at once, and a few heads one after the other. From q, k, v, z,
//      d_y, S and Z of a chunk to d_z, d_x, and per group of such heads the rows of d_q, d_k (back
//      through the rotation) and of the angles
//   3. with a gradient of final states, final_backward(): what the last token of a sequence gets
//   4. the angles' gradients of later chunks, summed
//   5. with states, initial_backward(): the gradients of what sequences began from
//   6. heads_backward(): sums over the heads, then back through the norms of B and C, and tanh
//   7. terms_backward(): dd_dt, dd_A and trap
//   8. gradients of parameters, from sums that each chunk left
//
// No two threads add to one place: the same arguments give the same bits.

#include <algorithm>

#include "cuda/column_sums.cuh"
#include "cuda/mixer_gradients.cuh"
#include "cuda/mixer_tiles.cuh"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "mixer_scan_backward";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The gradients of the terms of a chunk for a head's block, as far as chunk_backward() knows them;
// elements are tokens.
struct TermGradients {
  float log_decay[kTileRows];  // of A dt
  float gamma[kTileRows], scale[kTileRows];
  float dt[kTileRows];  // by way of the angles, those of later chunks left out
};

struct TileGradients {
  const bf16* states;         // (count, H, P, N) before each chunk
  const bf16* d_states;       // (count, H, P, N) after each chunk
  TermGradients* terms;       // (count, H, blocks)
  int heads_each, row_heads;  // blocks of heads that a thread block takes, adding up their rows;
                              // and H blocks / heads_each, the rows that are left
  bf16* rows;          // (count, rows, row_heads, 2 N + S) d_k and d_q before bias and rotation, in
                       // the order of place_in_row(), and in the first row of a token dt times the
                       // gradient of the angle from this token to the chunk's end
  float* later_angle;  // (count, H, blocks, S) of a whole chunk, then of the chunks after it
  float* d_D;          // (count, blocks, H)
  float* d_biases[2];  // (count, blocks, H, R, N) of B and C
  float *d_mimo_x, *d_mimo_z, *d_mimo_o;  // (count, H, R, P)
  float* d_carry;     // (count, H) of first chunks, with initial states; or null
  float* d_dt_bias;   // (count, H)
  float* d_norms[2];  // (count * kRowGroups, N) of B and C

  __device__ int64_t row_size(const MixerShape& s) const { return 2 * s.N + s.S; }
  // From a row to the next.
  __device__ int row_stride(const MixerShape& s) const {
    return row_heads * static_cast<int>(row_size(s));
  }
  // The first row of a chunk.
  __device__ bf16* rows_of(const MixerShape& s, int64_t chunk, int row_head) const {
    return rows + (chunk * kTileRows * row_heads + row_head) * row_size(s);
  }
};
// Of 32 columns of a tile the pairs that a lane of chunk_backward() has come side by side. The
// element of a row that is this column, and the column that is this element.
__host__ __device__ constexpr int pairs_together(int i) {
  return i / 32 * 32 + i % 8 / 2 * 8 + i % 32 / 8 * 2 + i % 2;
}
template <int kN>
__host__ __device__ constexpr int place_in_row(int element) {
  return place_of<kN>(pairs_together(element));
}
template <int kN>
__host__ __device__ constexpr int element_of_row(int place) {
  return pairs_together(column_of<kN>(place));
}

constexpr int kGroupRows = 16, kRowGroups = kTileRows / kGroupRows;  // of heads_backward

// Shared memory of chunk_backward. Z has a place before it where a multiprocessor then still holds
// two blocks; else it takes that of S.
template <int kN, int kS, int kR>
struct alignas(1024) BackwardShared {
  bf16 queries[kTileRows * kN], keys[kTileRows * kN];
  bf16 state[kTileChannels * kN];
  bf16 values[kTileRows * kTileChannels], d_y[kTileRows * kTileChannels];
  // W and the gradient of the scores. In the place of the latter SISO begins with z; MIMO with z
  // and the gradient of the outputs in that of W, and x in the other; and it has the gradients of
  // angles (rows, S) in f32 there at last, SISO in that of the rotary tables.
  bf16 weights[kTileRows * kTileRows], d_scores[kTileRows * kTileRows];
  char rotary[kS == 0 ? 1024 : SharedRotary<kS, kR>::kBytes];
  ChunkTerms terms;
  SharedBiases<kN, kR> biases;
  float decay_of_row[2][kTileRows];    // parts of the gradients of c_t: of the halves of the keys,
  float decay_of_state[2][kTileRows];  // and of the halves of the channels of S q
  float scale_of_key[4][kTileRows];    // of the gradient of scale_s, of 16 rows each
  float key_of_state[2][kTileRows];    // v_s . Z k_s, of the halves of the channels
  float gamma[kTileRows];
  // Sums over 16 rows each: SISO (B or C, 4, N) of the biases, MIMO (two of them, 4, R, channel) of
  // mimo_z and mimo_o, then of mimo_x.
  float sums_of_rows[2][4][kR == 1 ? kN : kR * kTileChannels];
  float sums[2][kWarps];
};

// Where a head's block is in arrays (count, blocks, H, ..), and its channels in (count, H, R, P).
__device__ inline int64_t block_head_of(const MixerTiles& g, const HeadBlock& head) {
  return (int64_t{head.index} * g.blocks + head.block) * g.m.s.H + head.h;
}
template <int kR>
__device__ int64_t ranks_of(const MixerShape& s, const HeadBlock& head) {
  return (int64_t{head.index} * s.H + head.h) * kR * s.P + head.block * kTileChannels;
}

// One of 8 warps: 16 rows, and half of the columns of what is computed.
struct Share {
  int rows, half, lane;
  int row;     // and 8 more
  int column;  // of a tile of 8
  __device__ explicit Share(int thread) { take(thread, true); }
  // What follows from the number of the thread, which the compiler is not to know to be the same as
  // before: addresses are worked out anew where they are needed, for registers are few.
  __device__ void take(int thread, bool half_too) {
    const int warp = thread / kWarp;
    if (half_too) half = __shfl_sync(~0u, warp / 4, 0);  // the same in all lanes, as it then knows
    lane = thread % kWarp;
    rows = warp % 4 * 16;
    row = rows + lane / 4;
    column = lane % 4 * 2;
  }
};

// Sums over the 4 lanes that share a row.
__device__ inline float row_sum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}
// The 4 lanes that share a row have a pair of columns of each of 4 tiles. Gives every lane a tile,
// that of its number in the four; or from tiles the pairs back. 16 bytes of a row at a time are a
// fourth of the accesses to memory, which would else be of 8 rows each.
__device__ inline uint4 exchanged(uint4 v) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  const auto exchange = [](uint32_t& low, uint32_t& high, bool mine, int distance) {
    const uint32_t got = __shfl_xor_sync(~0u, mine ? low : high, distance);
    (mine ? low : high) = got;
  };
  exchange(v.x, v.y, odd, 1);
  exchange(v.z, v.w, odd, 1);
  exchange(v.x, v.z, upper, 2);
  exchange(v.y, v.w, upper, 2);
  return v;
}
// The lane's tile of 4 tiles of a row in memory; zeros if it is not there.
__device__ inline uint4 tile_of_row(const bf16* row, bool present) {
  const int lane = static_cast<int>(threadIdx.x) % 4;
  return present ? *reinterpret_cast<const uint4*>(row + 8 * lane) : uint4{};
}
struct Pairs {
  uint32_t at[4];
  __device__ explicit Pairs(uint4 tile) {
    const uint4 v = exchanged(tile);
    at[0] = v.x, at[1] = v.y, at[2] = v.z, at[3] = v.w;
  }
};

// silu'(x), of its sigmoid.
__device__ inline float d_silu(float x, float sig) {
  return sig * fmaf(x, 1 - sig, 1.0f);
}

// The 16 x 16 block at (row, column) of a matrix in memory, as A.
__device__ inline FragmentA load_block(const bf16* matrix, int stride, int row, int column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const bf16* const at = matrix + (row + lane / 4) * stride + column + lane % 4 * 2;
  const auto pair = [&](int more) { return *reinterpret_cast<const uint32_t*>(at + more); };
  return {{pair(0), pair(8 * stride), pair(8), pair(8 * stride + 8)}};
}

// The warp's part of the sum over the elements of two tiles, of its rows and half of the columns,
// in all lanes together: the diagonal of a b^T. left(row, column) is a block of a.
template <int kN, typename Left>
__device__ float dot_of_tiles(const Left& left, const SharedTile<kN>& b, const Share& share) {
  FragmentC of_rows[2] = {};  // the products with rows share.rows and share.rows + 8 of b
#pragma unroll
  for (int i = 0; i < kN / 2; i += 16) {
    const int column = share.half * (kN / 2) + i;
    const FragmentA block = left(share.rows, column);
    const auto right = b.b_transposed(share.rows, column);
    mma(of_rows[0], block, right.left);
    mma(of_rows[1], block, right.right);
  }
  const bool odd = share.lane / 4 % 2;
  const float sum = odd ? of_rows[0].at[1] + of_rows[1].at[3] : of_rows[0].at[0] + of_rows[1].at[2];
  return share.lane / 8 == share.lane % 4 ? sum : 0.0f;
}

// Writes the gradients of queries or keys back through the rotation to `to` (the warp's row, and 8
// more, from what the lane has of them on) or adds them there, adds those of the angles to d_angle,
// and leaves the sums over the warp's rows in d_bias (SISO).
template <int kN, int kS, int kR>
__device__ void rotate_back(const FragmentC (&d)[kN / 16], const SharedTile<kN>& rotated,
                            const SharedRotary<kS, kR>& rotary, const Share& share, bf16* to,
                            int stride, bool add, float (&d_angle)[kN / 16][2], float* d_bias) {
  float2 sums[kN / 16] = {};
#pragma unroll
  for (int four = 0; four < kN / 16; four += 4) {
    uint32_t pairs[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = four + j, place = place_of<kN>(8 * i);
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int t = share.row + 8 * low;
        float a = d[i].at[2 * low], b = d[i].at[2 * low + 1];
        if (place < 2 * kS) {
          // d rot / d angle of a pair (x, y) is (-y, x).
          const float2 pair =
              unpack_bf16(rotated.load2(t, share.half * (kN / 2) + 8 * i, share.column));
          d_angle[i][low] = fmaf(b, pair.x, fmaf(-a, pair.y, d_angle[i][low]));
          const float2 cos_sin =
              __half22float2(rotary.cos_sin(t, place / 2, share.half, share.column / 2));
          const float turned = fmaf(a, cos_sin.x, b * cos_sin.y);
          b = fmaf(b, cos_sin.x, -a * cos_sin.y);
          a = turned;
        }
        sums[i].x += a;
        sums[i].y += b;
        pairs[low][j] = pack_bf16(a, b);
      }
    }
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const uint4 four_pairs = {pairs[low][0], pairs[low][1], pairs[low][2], pairs[low][3]};
      bf16* const at = to + low * 8 * stride + 8 * four;
      if (add) {
        add_to_memory(at, four_pairs);
      } else {
        *reinterpret_cast<uint4*>(at) = four_pairs;
      }
    }
  }
  if constexpr (kR == 1) {
    const int tile = TokenSums<kR, kN / 16>::run(sums);
    *reinterpret_cast<float2*>(d_bias + place_of<kN>(8 * tile) + 16 * share.half + share.column) =
        sums[0];
  }
}

// Writes the sums over the ranks of d (of the warp's row and 8 more, 4 tiles of columns) to `to`
// and, `stride` later, for the tokens that are there.
template <int kR>
__device__ void store_rank_sums(float2 (&d)[2][4], bf16* to, int64_t stride,
                                const bool (&here)[2]) {
#pragma unroll
  for (int low = 0; low < 2; ++low) {
    using Sums = RankSums<kR, 4>;
    bf16* const at = to + low * stride + 8 * Sums::run(d[low]);
#pragma unroll
    for (int i = 0; i < Sums::kLeft; ++i) {
      const uint32_t both = pack_bf16(d[low][i].x, d[low][i].y);
      if (here[low]) *reinterpret_cast<uint32_t*>(at + 8 * i) = both;
    }
  }
}
// Leaves the sums over the tokens of the warp's rows, (R, channel).
template <int kR>
__device__ void keep_token_sums(float2 (&d)[4], float (&sums)[kR * kTileChannels],
                                const Share& share) {
  using Sums = TokenSums<kR, 4>;
  const int tile = Sums::run(d);
  float* const to = sums + share.row % kR * kTileChannels + 32 * share.half + share.column;
#pragma unroll
  for (int i = 0; i < Sums::kLeft; ++i) {
    *reinterpret_cast<float2*>(to + 8 * (tile + i)) = d[i];
  }
}

// Adds up what 16 rows each have left of the gradients of two parameters (H, R, P) of MIMO.
template <int kR>
__device__ void finish_rank_sums(const float (&sums)[2][4][kR * kTileChannels], int thread,
                                 int count, float* first, float* second, int64_t P) {
  constexpr int kSize = kR * kTileChannels;
  for (int i = thread; i < count * kSize; i += kThreads) {
    const int which = i / kSize, at = i % kSize;
    float sum = 0;
#pragma unroll
    for (int rows16 = 0; rows16 < 4; ++rows16) sum += sums[which][rows16][at];
    (which ? second : first)[at / kTileChannels * P + at % kTileChannels] = sum;
  }
}

// The sums over the tokens of a chunk of d_k and d_q, from the rows in memory, for the biases of
// MIMO. The rows have the sums over `heads` heads, of which those of all but the last are there
// already. at(head) is where a head's are in d_B and d_C. `parts` is shared memory for 64 kR kN /
// 16 floats.
template <int kN, int kR, typename At>
__device__ void sum_biases(const bf16* rows, int row_stride, int thread, float* parts, float* d_B,
                           float* d_C, int heads, const At& at) {
  constexpr int kParts = kThreads / kN, kRows = kTileRows / kParts;  // a thread has a pair
  const int i = thread % kN, part = thread / kN;
  const bf16* from = rows + part * kRows * row_stride + 2 * i;  // d_q follows d_k
  float2 sums[kR] = {};
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float2 pair = unpack_bf16(load_from_l2(from + row * row_stride));
    sums[row % kR].x += pair.x;
    sums[row % kR].y += pair.y;
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    *reinterpret_cast<float2*>(parts + (part * kR + r) * 2 * kN + 2 * i) = sums[r];
  }
  __syncthreads();
  for (int j = thread; j < 2 * kR * kN; j += kThreads) {
    const int r = j / (2 * kN), which = j / kN % 2,
              n = channel_at<kN, kR>(place_in_row<kN>(j % kN));
    float* const to = (which ? d_C : d_B) + r * kN + n;  // the head's at at(head)
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kParts; ++k) sum += parts[k * 2 * kR * kN + j];
    for (int head = 0; head + 1 < heads; ++head) sum -= to[at(head)];
    to[at(heads - 1)] = sum;
  }
}

template <int kN, int kS, int kR>
__global__ void __launch_bounds__(kThreads, 2)
    chunk_backward(MixerTiles g, TileGradients d, MixerRows<const bf16> proj,
                   MixerRows<const bf16> d_out, MixerRows<bf16> d_proj, bool place_for_d_state) {
  MAMBA3_DYNAMIC_SHARED(__align__(1024) char, memory);
  using Shared = BackwardShared<kN, kS, kR>;
  constexpr int kQ = kTileRows / kR;
  auto& shared =
      *reinterpret_cast<Shared*>(memory + (place_for_d_state ? sizeof(Shared::state) : 0));
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int heads = d.heads_each, first_head = static_cast<int>(blockIdx.x) * heads;
  const MixerChunk chunk = m.chunks[blockIdx.y];
  if (chunk.tokens == 0) {  // of a bound that was not reached
    const int thread = static_cast<int>(threadIdx.x), c = static_cast<int>(blockIdx.y);
    for (int j = 0; j < heads; ++j) {
      const HeadBlock head(g, c, first_head + j);
      const int64_t block_head = block_head_of(g, head);
      for (int i = thread; i < kR * kN; i += kThreads) {
        d.d_biases[0][block_head * kR * kN + i] = d.d_biases[1][block_head * kR * kN + i] = 0;
      }
      for (int i = thread; i < kR * kTileChannels && kR > 1; i += kThreads) {
        const int64_t at = ranks_of<kR>(s, head) + i / kTileChannels * s.P + i % kTileChannels;
        d.d_mimo_x[at] = d.d_mimo_z[at] = d.d_mimo_o[at] = 0;
      }
      if (thread == 0) d.d_D[block_head] = 0;
    }
    return;
  }
  constexpr int kNext = 8 / kR;

  // Of all heads the same addresses would be computed before the loop, and spilled, if the compiler
  // knew that these are the same.
#pragma unroll 1
  for (int head_number = 0; head_number < heads; ++head_number) {
    const int thread = opaque(static_cast<int>(threadIdx.x)),
              c = opaque(static_cast<int>(blockIdx.y));
    Share share(thread);
    const SharedTile<kN> queries{shared_address(shared.queries)}, keys{shared_address(shared.keys)};
    const SharedTile<kN> state{shared_address(shared.state)};
    const SharedTile<kN> d_state{place_for_d_state ? shared_address(memory) : state.base};
    const SharedTile<64> values{shared_address(shared.values)}, d_y{shared_address(shared.d_y)};
    const SharedTile<64> weights{shared_address(shared.weights)},
        d_scores{shared_address(shared.d_scores)};
    const SharedRotary<kS, kR> rotary{shared_address(shared.rotary)};
    const ChunkTerms& terms = shared.terms;
    // Of the token of the warp's row, and of the one 8 rows after it.
    const int my_token = share.row / kR, my_rank = share.row % kR;
    const int row_stride = d.row_stride(s);
    // Registers are few, so that what is used once is worked out there.
    const auto this_chunk = [&] { return opaque(static_cast<int>(blockIdx.y)); };
    const auto this_head = [&] {
      return HeadBlock(g, this_chunk(), opaque(static_cast<int>(blockIdx.x)) * heads + head_number);
    };
    const auto this_token = [&](const auto& of_tokens, int64_t column) {
      const HeadBlock now = this_head();
      return of_tokens.at(chunk, my_token) + column + now.h * s.P + now.block * kTileChannels +
             32 * share.half;
    };
    const auto this_row = [&](int column) {
      return d.rows_of(s, this_chunk(), opaque(static_cast<int>(blockIdx.x))) +
             int64_t{share.row} * row_stride + column + share.half * (kN / 2) + share.lane % 4 * 8;
    };

    // What a head begins with, and what it needs later.
    const SharedTile<64> x_tokens = kR == 1 ? values : d_scores;
    const SharedTile<64> z_tokens = kR == 1 ? d_scores : weights;
    const SharedTile<64> d_tokens{kR == 1 ? d_y.base
                                          : weights.base + kQ * SharedTile<64>::kRowBytes};
    const auto ask_for_rows = [&](const HeadBlock& head) {
      using CopyRows = TileCopy<kN, const __half, kThreads>;
      const int group = s.G == 1 ? 0 : head.h / static_cast<int>(s.H / s.G);
      CopyRows(g.normed_of(head.index, 0, group), g.normed_stride(), thread)(keys);
      CopyRows(g.normed_of(head.index, 1, group), g.normed_stride(), thread)(queries);
    };
    const auto ask_for_tokens = [&](int head_block) {
      const HeadBlock head(g, this_chunk(), head_block);
      const int64_t channel = head.h * s.P + head.block * kTileChannels;
      const bf16* token = proj.at(chunk, 0) + channel;
      using Copy = TileCopy<kTileChannels, const bf16, kThreads, kQ>;
      Copy(token + s.x(), proj.token_stride, thread)(x_tokens, chunk.tokens);
      Copy(token + s.z(), proj.token_stride, thread)(z_tokens, chunk.tokens);
      Copy(d_out.at(chunk, 0) + channel, d_out.token_stride, thread)(d_tokens, chunk.tokens);
      if constexpr (kR == 1) ask_for_rows(head);
    };
    const auto ask_for_states = [&](int head_block) {
      const HeadBlock head(g, this_chunk(), head_block);
      copy_terms(shared.terms, g.terms_of(head.index, head.h));
      commit_copies();
      using CopyState = TileCopy<kN, const bf16, kThreads>;
      CopyState(d.states + head.state_at(m, head.index), kN, thread)(state);
      if (place_for_d_state) {
        CopyState(d.d_states + head.state_at(m, head.index), kN, thread)(d_state);
      }
      commit_copies();
    };
    if (head_number == 0) {
      ask_for_tokens(first_head);
      if constexpr (kR > 1) ask_for_rows(HeadBlock(g, this_chunk(), first_head));
      ask_for_states(first_head);
    }
    const HeadBlock head(g, c, first_head + head_number);
    const int h = head.h;
    const bool more = head_number + 1 < heads;
    const auto of_ranks = [&] { return ranks_of<kR>(s, this_head()); };
    AngleSteps<kS, kR, 2> steps;
    steps.load(g, c, h, share.rows, share.half);
    shared.biases.fill(m, h);
    if (kR > 1 && head_number > 0) {
      wait_copies<0>();
    } else {
      wait_copies<1>();
    }
    __syncthreads();

    // SISO: d_z = gates y.
    float2 gates[2][4];
    if constexpr (kR == 1) {
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int t = share.row + 8 * low;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 32 * share.half + 8 * i;
          const float2 z = unpack_bf16(z_tokens.load2(t, column, share.column));
          const float2 of_token = unpack_bf16(d_y.load2(t, column, share.column));
          const float2 sig = {fast_sigmoid(z.x), fast_sigmoid(z.y)};
          d_y.store2(t, column, share.column,
                     pack_bf16(of_token.x * z.x * sig.x, of_token.y * z.y * sig.y));
          gates[low][i] = {of_token.x * d_silu(z.x, sig.x), of_token.y * d_silu(z.y, sig.y)};
        }
      }
    } else if (share.half == 0) {
      expand_values<kR>(values, x_tokens, rank_of(m.w.mimo_x, s, head), s.P, share.rows);
    } else {
      expand_gradients<kR>(d_y, d_tokens, z_tokens, rank_of(m.w.mimo_o, s, head),
                           rank_of(m.w.mimo_z, s, head), s.P, share.rows);
    }
    rotary.fill(steps, terms, share.rows, share.half);
    __syncthreads();
    {
      const SharedTile<kN> mine{share.half == 0 ? keys.base : queries.base};
      FragmentA f[kN / 16];
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) f[i] = mine.a(share.rows, 16 * i);
      if (share.half == 0) {
#pragma unroll
        for (int i = 0; i < kN / 16; ++i) {
          turn<true, false>(&f[i], &f[i], 16 * i, shared.biases, rotary, share.rows);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kN / 16; ++i) {
          turn<false, true>(&f[i], &f[i], 16 * i, shared.biases, rotary, share.rows);
        }
      }
      __syncwarp();  // lanes have read each other's places
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) mine.store_a(share.rows, 16 * i, f[i]);
    }
    publish_tiles();
    __syncthreads();

    // Scores and the gradient of the weights, 16 rows and 32 keys a warp; from them the weights and
    // the gradient of the scores.
    {
      FragmentC scores[4] = {}, d_weights[4] = {};
      const int first_key = 32 * share.half;
      const int seen = first_key < share.rows + 16 ? kN : 0;  // else all keys are later
      start_product<false, false, kN>(scores, queries, keys, share.rows, first_key, 0, seen);
      start_product<false, false, kTileChannels>(d_weights, d_y, values, share.rows, first_key, 0,
                                                 seen);
      finish_products<0>();
      const float c_i[2] = {terms.c[share.row], terms.c[share.row + 8]};
      float of_row[2] = {}, of_gamma[2] = {};
      float2 of_keys[4];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        const int j = first_key + 8 * tile + share.column;
        const float2 c_j = *reinterpret_cast<const float2*>(&terms.c[j]);
        const float2 scale_j = *reinterpret_cast<const float2*>(&terms.scale[j]);
        float of_key[2] = {};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int t = share.row + e / 2 * 8, behind = t / kR - (j + e % 2) / kR;
          const float score = scores[tile].at[e], d_weight = d_weights[tile].at[e];
          const float decay = behind > 0 ? fast_exp2(c_i[e / 2] - (e % 2 ? c_j.y : c_j.x)) : 0.0f;
          const float scale = e % 2 ? scale_j.y : scale_j.x;
          const float both = d_weight * score;
          of_key[e % 2] = fmaf(both, decay, of_key[e % 2]);
          of_row[e / 2] = fmaf(both, decay * scale, of_row[e / 2]);
          float factor = decay * scale;
          if (behind == 0) {
            factor = terms.gamma[t];
            of_gamma[e / 2] += both;
          }
          scores[tile].at[e] = score * factor;
          d_weights[tile].at[e] = d_weight * factor;
        }
        weights.store_c(share.rows, first_key + 8 * tile, scores[tile]);
        d_scores.store_c(share.rows, first_key + 8 * tile, d_weights[tile]);
        of_keys[tile] = {of_key[0], of_key[1]};
      }
      const int tile = TokenSums<1, 4>::run(of_keys);  // of all rows
      *reinterpret_cast<float2*>(
          &shared.scale_of_key[share.rows / 16][first_key + 8 * tile + share.column]) = of_keys[0];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const float sum = row_sum(of_row[low]), gamma = row_sum(of_gamma[low]);
        if (share.column > 0) continue;
        shared.decay_of_row[share.half][share.row + 8 * low] = sum;
        // Keys of the same token are all in one half.
        if (share.rows / 32 == share.half) shared.gamma[share.row + 8 * low] = gamma;
      }
    }
    // What MIMO's d_z needs, on its way while others arrive.
    uint4 z[2], from_above[2];
    const bool here[2] = {my_token < chunk.tokens, my_token + kNext < chunk.tokens};
#pragma unroll
    for (int low = 0; low < 2 && kR > 1; ++low) {
      const bf16* const my_z = this_token(proj, s.z());
      const bf16* const my_d = this_token(d_out, 0);
      z[low] = tile_of_row(my_z + low * kNext * proj.token_stride, here[low]);
      from_above[low] = tile_of_row(my_d + low * kNext * d_out.token_stride, here[low]);
    }
    wait_copies<0>();
    publish_tiles();
    __syncthreads();

    share.take(opaque(thread), kR > 1);
    // Outputs again, 16 rows and 32 channels a warp, for d_z; and on its way meanwhile d_y S.
    const float D = m.w.D[h];
    float d_D = 0;
    FragmentC d_q[kN / 16] = {};
    const auto start_d_q = [&] {
      start_product<false, true, kTileChannels>(d_q, d_y, state, share.rows, share.half * (kN / 2));
    };
    {
      const int first = 32 * share.half;
      FragmentC y[4] = {};
      start_product<false, false, kN>(y, queries, state, share.rows, first);
      finish_products<0>();
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int t = share.row + 8 * low;
        const float from_start = terms.from_start[t];
        float of_state = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 d = unpack_bf16(d_y.load2(t, first + 8 * i, share.column));
          const float2 v = unpack_bf16(values.load2(t, first + 8 * i, share.column));
          float* pair = &y[i].at[2 * low];
          pair[0] *= from_start;
          pair[1] *= from_start;
          of_state = fmaf(d.x, pair[0], fmaf(d.y, pair[1], of_state));
          d_D = fmaf(d.x, v.x, fmaf(d.y, v.y, d_D));
          pair[0] = fmaf(D, v.x, pair[0]);
          pair[1] = fmaf(D, v.y, pair[1]);
        }
        of_state = row_sum(of_state);
        if (share.column == 0) shared.decay_of_state[share.half][t] = of_state;
      }
      start_product<false, true, kTileRows>(y, weights, values, share.rows, first, 0,
                                            share.rows + 16);
      if constexpr (kR == 1) start_d_q();  // MIMO has no registers for these sums yet
      finish_products<(kR == 1 ? 1 : 0)>();
      bf16* const to = this_token(d_proj, s.z());
      if constexpr (kR == 1) {
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          uint32_t d_z[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            d_z[i] = pack_bf16(gates[low][i].x * y[i].at[2 * low],
                               gates[low][i].y * y[i].at[2 * low + 1]);
          }
          const uint4 tile = exchanged({d_z[0], d_z[1], d_z[2], d_z[3]});
          if (!here[low]) continue;
          *reinterpret_cast<uint4*>(to + low * 8 * d_proj.token_stride + 4 * share.column) = tile;
        }
      } else {
        // Of z, and over the tokens of mimo_z and mimo_o.
        const Pairs zs[2] = {Pairs(z[0]), Pairs(z[1])};
        const Pairs above[2] = {Pairs(from_above[0]), Pairs(from_above[1])};
        const float* const gate = rank_of(m.w.mimo_z, s, head, my_rank) + first + share.column;
        const float* const down = rank_of(m.w.mimo_o, s, head, my_rank) + first + share.column;
        float2 d_z[2][4], d_gate[4] = {}, d_down[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 g = *reinterpret_cast<const float2*>(gate + 8 * i);
          const float2 o = *reinterpret_cast<const float2*>(down + 8 * i);
#pragma unroll
          for (int low = 0; low < 2; ++low) {
            const float2 z_t = unpack_bf16(zs[low].at[i]), d = unpack_bf16(above[low].at[i]);
            const auto one = [&](float z_p, float d_p, float y_p, float g_p, float o_p, float& of_g,
                                 float& of_o) {
              const float x = z_p * g_p, sig = fast_sigmoid(x), d_gated = d_p * y_p;
              of_o = fmaf(d_gated, x * sig, of_o);
              const float d_x = d_gated * o_p * d_silu(x, sig);
              of_g = fmaf(d_x, z_p, of_g);
              return d_x * g_p;
            };
            d_z[low][i] = {
                one(z_t.x, d.x, y[i].at[2 * low], g.x, o.x, d_gate[i].x, d_down[i].x),
                one(z_t.y, d.y, y[i].at[2 * low + 1], g.y, o.y, d_gate[i].y, d_down[i].y)};
          }
        }
        store_rank_sums<kR>(d_z, to + share.column, kNext * d_proj.token_stride, here);
        keep_token_sums<kR>(d_gate, shared.sums_of_rows[0][share.rows / 16], share);
        keep_token_sums<kR>(d_down, shared.sums_of_rows[1][share.rows / 16], share);
      }
    }

    share.take(opaque(thread), kR > 1);
    // d_q = exp(c_t) d_y S + d_scores k, 16 rows and half of the columns a warp.
    float d_angle[kN / 16][2] = {};
    {
      if constexpr (kR > 1) start_d_q();
      finish_products<0>();
      if (kR > 1 || !place_for_d_state) __syncthreads();  // S has been read
      if constexpr (kR > 1) {
        finish_rank_sums<kR>(shared.sums_of_rows, thread, 2, d.d_mimo_z + of_ranks(),
                             d.d_mimo_o + of_ranks(), s.P);
      }
      if (!place_for_d_state) {
        TileCopy<kN, const bf16, kThreads>(d.d_states + head.state_at(m, c), kN, thread)(d_state);
        commit_copies();
      }
      const float from_start[2] = {terms.from_start[share.row], terms.from_start[share.row + 8]};
#pragma unroll
      for (FragmentC& tile : d_q) {
#pragma unroll
        for (int e = 0; e < 4; ++e) tile.at[e] *= from_start[e / 2];
      }
      start_product<false, true, kTileRows>(d_q, d_scores, keys, share.rows, share.half * (kN / 2),
                                            0, share.rows + 16);
      finish_products<0>();
      rotate_back<kN, kS, kR>(d_q, queries, rotary, share, this_row(kN), row_stride,
                              head_number > 0, d_angle, shared.sums_of_rows[1][share.rows / 16]);
    }
    if (kR > 1 || !place_for_d_state) {
      wait_copies<0>();
      publish_tiles();
      __syncthreads();
    }

    share.take(opaque(thread), kR > 1);
    // d_v = to_end_s Z k_s + W^T d_y + D d_y, 16 rows and 32 channels a warp. The state after the
    // chunk holds exp(c_Q) times the one before it.
    float state_dot = 0;
    FragmentC d_k[kN / 16] = {};
    {
      const int first = 32 * share.half;
      FragmentC d_v[4] = {};
      start_product<false, false, kN>(d_v, keys, d_state, share.rows, first);
      start_product<false, true, kTileChannels>(d_k, values, d_state, share.rows,
                                                share.half * (kN / 2));
      if (place_for_d_state) {
        state_dot =
            dot_of_tiles([&](int row, int column) { return state.a(row, column); }, d_state, share);
      } else {
        const bf16* const before = d.states + head.state_at(m, c);
        state_dot =
            dot_of_tiles([&](int row, int column) { return load_block(before, kN, row, column); },
                         d_state, share);
      }
      finish_products<1>();
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        const int t = share.row + 8 * low;
        const float to_end = terms.to_end[t];
        float dot = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack_bf16(values.load2(t, first + 8 * i, share.column));
          float* pair = &d_v[i].at[2 * low];
          dot = fmaf(v.x, pair[0], fmaf(v.y, pair[1], dot));
          pair[0] *= to_end;
          pair[1] *= to_end;
        }
        dot = row_sum(dot);
        if (share.column == 0) shared.key_of_state[share.half][t] = dot;
      }
      start_product<true, true, kTileRows>(d_v, weights, d_y, share.rows, first, share.rows);
      finish_products<0>();
      bf16* const to = this_token(d_proj, s.x());
      float2 d_x[2][4];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 skip =
              unpack_bf16(d_y.load2(share.row + 8 * low, first + 8 * i, share.column));
          d_x[low][i] = {fmaf(D, skip.x, d_v[i].at[2 * low]),
                         fmaf(D, skip.y, d_v[i].at[2 * low + 1])};
        }
        if constexpr (kR == 1) {
          const auto packed = [&](int i) { return pack_bf16(d_x[low][i].x, d_x[low][i].y); };
          const uint4 tile = exchanged({packed(0), packed(1), packed(2), packed(3)});
          if (!here[low]) continue;
          *reinterpret_cast<uint4*>(to + low * 8 * d_proj.token_stride + 4 * share.column) = tile;
        }
      }
      if constexpr (kR > 1) {
        const bf16* const x = this_token(proj, s.x());
        const Pairs xs[2] = {Pairs(tile_of_row(x, here[0])),
                             Pairs(tile_of_row(x + kNext * proj.token_stride, here[1]))};
        const float* const up = rank_of(m.w.mimo_x, s, head, my_rank) + first + share.column;
        float2 d_up[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 u = *reinterpret_cast<const float2*>(up + 8 * i);
#pragma unroll
          for (int low = 0; low < 2; ++low) {
            const float2 x_p = unpack_bf16(xs[low].at[i]);
            float2& of_row = d_x[low][i];
            d_up[i].x = fmaf(of_row.x, x_p.x, d_up[i].x);
            d_up[i].y = fmaf(of_row.y, x_p.y, d_up[i].y);
            of_row.x *= u.x;
            of_row.y *= u.y;
          }
        }
        store_rank_sums<kR>(d_x, to + share.column, kNext * d_proj.token_stride, here);
        keep_token_sums<kR>(d_up, shared.sums_of_rows[0][share.rows / 16], share);
      }
    }

    share.take(opaque(thread), kR > 1);
    // d_k = to_end_s v_s Z + d_scores^T q
    {
      finish_products<0>();
      const float to_end[2] = {terms.to_end[share.row], terms.to_end[share.row + 8]};
#pragma unroll
      for (FragmentC& tile : d_k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) tile.at[e] *= to_end[e / 2];
      }
      start_product<true, true, kTileRows>(d_k, d_scores, queries, share.rows,
                                           share.half * (kN / 2), share.rows);
      finish_products<0>();
      rotate_back<kN, kS, kR>(d_k, keys, rotary, share, this_row(0), row_stride, head_number > 0,
                              d_angle, shared.sums_of_rows[0][share.rows / 16]);
    }
    state_dot = warp_sum(state_dot);
    d_D = warp_sum(d_D);
    if (share.lane == 0) {
      shared.sums[0][thread / kWarp] = state_dot;
      shared.sums[1][thread / kWarp] = d_D;
    }
    __syncthreads();

    // What the next head of SISO begins with has places by now. For MIMO sums over tokens and the
    // gradients of the angles come there first.
    if (kR == 1 && more) ask_for_tokens(first_head + head_number + 1);
    const HeadBlock ended = this_head();
    const int64_t block_head = block_head_of(g, ended);
    const int64_t head_block = (int64_t{ended.index} * s.H + ended.h) * g.blocks + ended.block;
    bf16* const rows = d.rows_of(s, ended.index, opaque(static_cast<int>(blockIdx.x)));
    if constexpr (kR == 1) {
      for (int i = thread; i < 2 * kN; i += kThreads) {
        const int which = i / kN, n = i % kN;
        float sum = 0;
#pragma unroll
        for (int rows16 = 0; rows16 < 4; ++rows16) sum += shared.sums_of_rows[which][rows16][n];
        // Not d_biases[which]: an index that is not a constant puts the pointers into local memory.
        (which ? d.d_biases[1] : d.d_biases[0])[block_head * kN + n] = sum;
      }
    } else {
      finish_rank_sums<kR>(shared.sums_of_rows, thread, 1, d.d_mimo_x + of_ranks(), nullptr, s.P);
      static_assert(sizeof(shared.queries) + sizeof(shared.keys) >= 4 * kR * kTileRows * kN / 16);
      sum_biases<kN, kR>(rows, row_stride, thread, reinterpret_cast<float*>(shared.queries),
                         d.d_biases[0], d.d_biases[1], head_number + 1, [&](int number) {
                           const HeadBlock of(g, ended.index, first_head + number);
                           return block_head_of(g, of) * kR * kN;
                         });
    }
    // The angles: a token's is in those of all later tokens. Threads are (part of the chunk,
    // angle).
    TermGradients& to = d.terms[head_block];
    // Two rows a lane of the first warp; then the terms of the next head may come.
    const float2 my_c = *reinterpret_cast<const float2*>(&terms.c[2 * share.lane]);
    const float2 my_scale = *reinterpret_cast<const float2*>(&terms.scale[2 * share.lane]);
    const float2 my_to_end = *reinterpret_cast<const float2*>(&terms.to_end[2 * share.lane]);
    const float last_c = terms.c[kTileRows - 1];
    if constexpr (kS > 0) {
      constexpr int kParts = kThreads / kS, kEach = kTileRows / kParts;
      auto* const angles = kR == 1 ? reinterpret_cast<float*>(shared.rotary)
                                   : reinterpret_cast<float*>(shared.weights);
      static_assert(kR > 1 || sizeof(shared.rotary) >= sizeof(float) * kTileRows * kS);
      // Permuted, so that 8 rows of 4 columns are in different banks.
      const auto place_at = [](int t, int pair, int eighth) {  // t % 8
        return t * kS + (pair ^ (kS < 32 ? eighth / 2 : eighth) * 4);
      };
      float* const parts = shared.sums_of_rows[0][0];  // once these have been added up
      const int i = thread % kS, part = thread / kS;
      const auto eighth = [&](int j) { return kEach % 8 == 0 ? j % 8 : (part * kEach + j) % 8; };
      float theta[kEach], dt[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        theta[j] = m.theta[(int64_t{ended.index} * kQ + (part * kEach + j) / kR) * kS + i];
        dt[j] = terms.dt[part * kEach + j];
      }
#pragma unroll
      for (int tile = 0; tile < kN / 16; ++tile) {
        if (place_of<kN>(8 * tile) >= 2 * kS) break;
        const int pair = (place_of<kN>(8 * tile) + 16 * share.half + share.column) / 2;
#pragma unroll
        for (int low = 0; low < 2; ++low) {
          angles[place_at(share.row + 8 * low, pair, share.lane / 4)] = d_angle[tile][low];
        }
      }
      __syncthreads();
      if constexpr (kR > 1) {
        if (more) ask_for_rows(HeadBlock(g, this_chunk(), first_head + head_number + 1));
      }
      if (more) ask_for_states(first_head + head_number + 1);
      float later[kEach];
      float sum = 0;
#pragma unroll
      for (int j = kEach - 1; j >= 0; --j) {
        sum += angles[place_at(part * kEach + j, i, eighth(j))];
        later[j] = sum;
      }
      bf16* angle_row = rows + part * kEach * row_stride + 2 * kN + i;
      bf16 of_others[kEach];  // the heads before
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        of_others[j] = head_number > 0 ? angle_row[j * row_stride] : bf16{};
      }
      parts[part * kS + i] = sum;
      __syncthreads();
      float after = 0;
      for (int j = part + 1; j < kParts; ++j) after += parts[j * kS + i];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int t = part * kEach + j;
        later[j] += after;
        angles[place_at(t, i, eighth(j))] = theta[j] * later[j];
        if (t % kR == 0) {
          *angle_row = from_float<bf16>(fmaf(dt[j], later[j], to_float(of_others[j])));
        }
        angle_row += row_stride;
      }
      if (part == 0) d.later_angle[head_block * kS + i] = later[0];
      __syncthreads();
      // A token's part in dt: 4 lanes a token.
      const int t = thread / 4;
      float of_dt = 0;
#pragma unroll
      for (int j = 0; j < kS / 4; ++j) {
        of_dt += angles[place_at(t, thread % 4 + 4 * j, share.lane / 4)];
      }
      of_dt = row_sum(of_dt);
      if (thread % 4 == 0 && t % kR == 0) to.dt[t / kR] = of_dt;
    } else {
      if (thread < kQ) to.dt[thread] = 0;
      __syncthreads();
      if (more) ask_for_states(first_head + head_number + 1);
    }

    if (kR > 1 && more) {
      __syncthreads();
      ask_for_tokens(first_head + head_number + 1);
      commit_copies();
    }

    // The terms, two rows a lane.
    if (thread >= 2 * kWarp) continue;
    const float of_warp = share.lane < kWarps ? shared.sums[thread / kWarp][share.lane] : 0.0f;
    if (thread >= kWarp) {
      const float d_D_sum = warp_sum(of_warp);
      if (share.lane == 0) d.d_D[block_head] = d_D_sum;
      continue;
    }
    float d_c[2], d_scales[2], of_states = fast_exp2(last_c) * of_warp;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = 2 * thread + j;
      const float key_dot = shared.key_of_state[0][t] + shared.key_of_state[1][t];
      float d_scale = fast_exp2(last_c - (j ? my_c.y : my_c.x)) * key_dot;
#pragma unroll
      for (int rows16 = 0; rows16 < 4; ++rows16) d_scale += shared.scale_of_key[rows16][t];
      of_states = fmaf(j ? my_to_end.y : my_to_end.x, key_dot, of_states);
      d_c[j] = shared.decay_of_row[0][t] + shared.decay_of_row[1][t] + shared.decay_of_state[0][t] +
               shared.decay_of_state[1][t] - (j ? my_scale.y : my_scale.x) * d_scale;
      d_scales[j] = d_scale;
    }
    float d_gammas[2] = {shared.gamma[2 * thread], shared.gamma[2 * thread + 1]};
    if constexpr (kR == 1) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        to.gamma[2 * thread + j] = d_gammas[j];
        to.scale[2 * thread + j] = d_scales[j];
      }
    } else {
      float d_gamma = d_gammas[0] + d_gammas[1], d_scale = d_scales[0] + d_scales[1];
#pragma unroll
      for (int distance = 1; distance < kR / 2; distance *= 2) {
        d_gamma += __shfl_xor_sync(~0u, d_gamma, distance);
        d_scale += __shfl_xor_sync(~0u, d_scale, distance);
      }
      if (2 * thread % kR == 0) {
        to.gamma[2 * thread / kR] = d_gamma;
        to.scale[2 * thread / kR] = d_scale;
      }
    }
    // What enters at the end of the chunk is in the sum of every token.
    const float last = warp_sum(of_states);
    float after = d_c[0] + d_c[1];
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float other = __shfl_down_sync(~0u, after, distance);
      if (thread + distance < kWarp) after += other;
    }
    // What a token has is in all rows from its first one on.
    if (2 * thread % kR == 0) to.log_decay[2 * thread / kR] = last + after;
    if (kR == 1) to.log_decay[2 * thread + 1] = last + after - d_c[0];
  }
}

// Sums over the heads of a group, then back through the norms of B and C; the angles' sum over all
// heads. Block: kGroupRows rows of a chunk. A warp has B or C of every fourth row, then the angles
// of two, if they are the first of a token.
template <int kN, int kR>
__global__ void __launch_bounds__(kThreads)
    heads_backward(MixerTiles g, TileGradients d, MixerRows<const bf16> proj,
                   MixerRows<bf16> d_proj) {
  constexpr int kEach = kN / kWarp, kSlots = kWarps / 2, kTileHeads = 64;
  static_assert(kGroupRows == 2 * kWarps);
  __shared__ float sums[kSlots][2][kN], in_order[kWarps][kN];
  __shared__ float later[kTileHeads * kN / 2], dt[kTileHeads * kGroupRows];
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x) / kRowGroups;
  const int first = static_cast<int>(blockIdx.x) % kRowGroups * kGroupRows;
  constexpr int kQ = kTileRows / kR;
  const int S = static_cast<int>(s.S), G = static_cast<int>(s.G), size = 2 * kN + S;
  const int heads = static_cast<int>(s.H) * g.blocks, group_heads = d.row_heads / G;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, which = warp % 2, slot = warp / 2;
  const MixerChunk chunk = m.chunks[c];
  const bf16* const rows = d.rows_of(s, c, 0);

  float weight[kEach], d_norm[kEach] = {};
  load_places<kR>(which ? m.w.C_norm : m.w.B_norm, weight);
  const int row_end = min(first + kGroupRows, chunk.tokens * kR);
  for (int row = first + slot; row < row_end; row += kSlots) {
    for (int group = 0; group < G; ++group) {
      const bf16* from =
          rows + (int64_t{row} * d.row_heads + group * group_heads) * size + which * kN;
      float sum[kEach] = {};
      const auto add = [&](int head) {
        float of_head[kEach];
        load<kEach>(from + int64_t{head} * size + lane * kEach, of_head);
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum[i] += of_head[i];
      };
      int head = 0;
      for (; head + 16 <= group_heads; head += 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) add(head + i);
      }
      for (; head < group_heads; ++head) add(head);
      // From elements of the row to places.
      __syncwarp();
      store(sum, &in_order[warp][lane * kEach]);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kEach; i += 2) {
        const int element = element_of_row<kN>(lane * kEach + i);
        sum[i] = in_order[warp][element], sum[i + 1] = in_order[warp][element + 1];
      }

      const int t = row / kR;
      const int64_t column =
          s.B() + ((int64_t{which} * kR + row % kR) * G + group) * kN;  // C follows
      float raw[kEach];
      load_places<kR>(proj.at(chunk, t) + column, raw);
      const float rstd = m.rstd[((int64_t{c} * kTileRows + row) * 2 + which) * G + group];
      float mean = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        raw[i] *= rstd;
        d_norm[i] = fmaf(sum[i], raw[i], d_norm[i]);
        mean = fmaf(sum[i] * weight[i], raw[i], mean);
      }
      mean = warp_sum(mean) / kN;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        sum[i] = fmaf(-raw[i], mean, sum[i] * weight[i]) * rstd;
      }
      store_places<kR>(sum, d_proj.at(chunk, t) + column);
    }
  }
  store(d_norm, &sums[slot][which][lane * kEach]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kN; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) sum += sums[j][i / kN][i % kN];
    const int n = channel_at<kN, kR>(i % kN);
    (i < kN ? d.d_norms[0] : d.d_norms[1])[int64_t{blockIdx.x} * kN + n] = sum;
  }

  // Two rows a warp; a lane has a pair of angles, and where there are fewer pairs than lanes every
  // second or fourth head.
  if (S == 0 || first >= chunk.tokens * kR) return;
  const int pairs = S / 2, pair = lane % pairs, sub = lane / pairs, step = kWarp / pairs;
  float2 d_angle[2] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int t = warp + j * kWarps;
    if (t % kR > 0) continue;
    const bf16* row = rows + int64_t{first + t} * d.row_heads * size + 2 * kN + 2 * pair;
#pragma unroll 8
    for (int head = sub; head < d.row_heads; head += step) {
      const float2 own =
          unpack_bf16(*reinterpret_cast<const uint32_t*>(row + int64_t{head} * size));
      d_angle[j].x += own.x;
      d_angle[j].y += own.y;
    }
  }
  for (int head0 = 0; head0 < heads; head0 += kTileHeads) {
    const int tile_heads = min(kTileHeads, heads - head0);
    __syncthreads();  // the last tile has been used
    const float* from = d.later_angle + (int64_t{c} * heads + head0) * S;
    for (int i = static_cast<int>(threadIdx.x); i < tile_heads * S; i += kThreads) {
      later[i] = from[i];
    }
    for (int i = static_cast<int>(threadIdx.x); i < tile_heads * kGroupRows; i += kThreads) {
      const int head = (head0 + i / kGroupRows) / g.blocks;
      dt[i] = g.terms_of(c, head)->dt[first + i % kGroupRows];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int t = warp + j * kWarps;
      if (t % kR > 0) continue;
#pragma unroll 8
      for (int head = sub; head < tile_heads; head += step) {
        const float2 after = *reinterpret_cast<const float2*>(&later[head * S + 2 * pair]);
        const float dt_t = dt[head * kGroupRows + t];
        d_angle[j].x = fmaf(dt_t, after.x, d_angle[j].x);
        d_angle[j].y = fmaf(dt_t, after.y, d_angle[j].y);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int lanes = pairs; lanes < kWarp; lanes *= 2) {
      d_angle[j].x += __shfl_xor_sync(~0u, d_angle[j].x, lanes);
      d_angle[j].y += __shfl_xor_sync(~0u, d_angle[j].y, lanes);
    }
    const int row = first + warp + j * kWarps, t = row / kR;
    if (t >= chunk.tokens || sub > 0 || row % kR > 0) continue;
    // theta = pi tanh(angle), so d theta / d angle = pi - theta^2 / pi.
    const float* theta = m.theta + (int64_t{c} * kQ + t) * S + 2 * pair;
    bf16* to = d_proj.at(chunk, t) + s.angle() + 2 * pair;
    to[0] = from_float<bf16>(d_angle[j].x * fmaf(-theta[0] / kPi, theta[0], kPi));
    to[1] = from_float<bf16>(d_angle[j].y * fmaf(-theta[1] / kPi, theta[1], kPi));
  }
}

// What the last tokens of sequences get from the gradients of the final key, value and angle; that
// of the angle, with what the key gives to it, goes to `ends` (sequences, H, blocks, S). Block: the
// heads that share rows, and a chunk; a thread has a pair of channels of every rank.
template <int kN, int kS, int kR>
__global__ void __launch_bounds__(kN / 2)
    final_backward(MixerTiles g, TileGradients d, MixerRows<bf16> d_proj, MixerPool<float> d_final,
                   float* ends) {
  constexpr int kQ = kTileRows / kR, kStepTokens = kWarpRows / kR;
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.y), i = static_cast<int>(threadIdx.x);
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0 || !chunk.last) return;
  for (int j = 0; j < d.heads_each; ++j) {
    const int head_block = static_cast<int>(blockIdx.x) * d.heads_each + j,
              h = head_block / g.blocks;
    if (head_block % g.blocks > 0) continue;
    const int t = chunk.tokens - 1, group = h / static_cast<int>(s.H / s.G);
    const int64_t row = d_final.rows[chunk.sequence] * s.H + h;

    float cosine = 1, sine = 0, d_angle = 0;
    if (i < kS) {
      const ChunkTerms& terms = *g.terms_of(c, h);
      const int step = t / kStepTokens;
      float phi = g.angle[((int64_t{c} * kAngles + step) * s.H + h) * kS + i];
      for (int u = step * kStepTokens; u <= t; ++u) {
        phi = fmaf(m.theta[(int64_t{c} * kQ + u) * kS + i], terms.dt[u * kR], phi);
      }
      sincosf(phi, &sine, &cosine);
    }
    const int a = channel_at<kN, kR>(2 * i), b = channel_at<kN, kR>(2 * i + 1);
    for (int r = 0; r < kR; ++r) {
      const float* d_key = d_final.k_prev + k_prev_row(s, row, r) * kN;
      const float* bias = m.w.B_bias + (h * kR + r) * kN;
      const __half* normed = g.normed_of(c, 0, group) + (t * kR + r) * g.normed_stride();
      const float2 key =
          __half22float2(*reinterpret_cast<const __half2*>(normed + column_of<kN>(2 * i)));
      const float x = key.x + bias[a], y = key.y + bias[b], d_x = d_key[a], d_y = d_key[b];
      // d rot / d angle of a rotated pair (x, y) is (-y, x).
      d_angle = fmaf(d_y, x * cosine - y * sine, fmaf(-d_x, x * sine + y * cosine, d_angle));
      const float turned_x = fmaf(d_x, cosine, d_y * sine);
      const float turned_y = fmaf(d_y, cosine, -d_x * sine);
      auto* const rows =
          reinterpret_cast<uint32_t*>(d.rows_of(s, c, static_cast<int>(blockIdx.x)) +
                                      (t * kR + r) * d.row_stride(s) + element_of_row<kN>(2 * i));
      const float2 before = unpack_bf16(*rows);
      *rows = pack_bf16(before.x + turned_x, before.y + turned_y);
      float* d_bias = d.d_biases[0] + ((int64_t{c} * g.blocks * s.H + h) * kR + r) * kN;
      d_bias[a] += turned_x;
      d_bias[b] += turned_y;
    }
    if (i < kS) {
      float* const to = ends + (int64_t{chunk.sequence} * s.H + h) * g.blocks * kS + i;
      to[0] = d_final.angle[row * kS + i] + d_angle;
      for (int block = 1; block < g.blocks; ++block) to[block * kS] = 0;
    }
    for (int p = i; p < s.P; p += kN / 2) {
      bf16& d_x = d_proj.at(chunk, t)[s.x() + h * s.P + p];
      d_x = from_float<bf16>(to_float(d_x) + d_final.v_prev[row * s.P + p]);
    }
  }
}

// The gradients of the states that the sequences began from, to where those of the final ones were
// read; and d_carry. Block: a head and a chunk.
__global__ void __launch_bounds__(kThreads)
    initial_backward(MixerTiles g, TileGradients d, MixerPool<float> pool, MixerPool<float> d_pool,
                     const float* ends) {
  __shared__ float sums[kWarps];
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int h = static_cast<int>(blockIdx.x), c = static_cast<int>(blockIdx.y);
  const int thread = static_cast<int>(threadIdx.x);
  const MixerChunk chunk = m.chunks[c];
  if (chunk.tokens == 0 || !chunk.first) return;
  const int64_t head = int64_t{chunk.sequence} * s.H + h, size = s.P * s.N, apart = s.H * s.N;
  const float* d_initial = g.d_initial + head * size;
  float *d_k_prev = nullptr, *d_v_prev = nullptr;
  if (d_pool.rows) {
    const int64_t row = d_pool.rows[chunk.sequence] * s.H + h;
    d_k_prev = d_pool.k_prev + k_prev_row(s, row, 0) * s.N;
    d_v_prev = d_pool.v_prev + row * s.P;
    for (int64_t i = thread; i < size; i += kThreads) d_pool.ssm[row * size + i] = d_initial[i];
    for (int64_t i = thread; i < s.S; i += kThreads) {
      float sum = 0;
      for (int block = 0; block < g.blocks; ++block) {
        sum += ends[(head * g.blocks + block) * s.S + i];
      }
      d_pool.angle[row * s.S + i] = sum;
    }
  }
  if (!pool.rows) {
    if (!d_k_prev) return;
    for (int64_t i = thread; i < s.R * s.N; i += kThreads) d_k_prev[i / s.N * apart + i % s.N] = 0;
    for (int64_t p = thread; p < s.P; p += kThreads) d_v_prev[p] = 0;
    return;
  }
  const int64_t row = pool.rows[chunk.sequence] * s.H + h;
  const CarryGradients gradients = {
      .k_prev = pool.k_prev + k_prev_row(s, row, 0) * s.N,
      .v_prev = pool.v_prev + row * s.P,
      .d_k_prev = d_k_prev,
      .d_v_prev = d_v_prev,
      .d_mimo_x = s.mimo ? d.d_mimo_x + (int64_t{c} * s.H + h) * s.R * s.P : nullptr};
  const ChunkTerms& terms = *g.terms_of(c, h);
  const float d_carry = gradients.run(s, m.w, h, d_initial, terms.dt[0] - terms.gamma[0], sums);
  if (thread == 0) d.d_carry[int64_t{c} * s.H + h] = d_carry;
}

// The last two columns of a token that are not known before the chunk before it: those of its
// head's first token in the segment wait in `pending`, and are taken up from `waiting` by the
// segment before.
struct Pending {
  float* gamma;  // (H)
  float* rest;   // (H) of dt
};

// dd_dt, dd_A and trap: gamma_t = lam_t dt_t, carry_t = (1 - lam_t) dt_t,
// scale_t = gamma_t + carry_{t+1}. Block: a chunk and 32 heads, a lane each.
__global__ void __launch_bounds__(kThreads)
    terms_backward(MixerTiles g, TileGradients d, MixerRows<const bf16> proj,
                   MixerRows<bf16> d_proj, Pending waiting, Pending pending) {
  __shared__ float sums[kWarps][kWarp];
  MAMBA3_DYNAMIC_SHARED(float, later);  // (32 heads, S + 1)
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const int c = static_cast<int>(blockIdx.x), S = static_cast<int>(s.S);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int head0 = static_cast<int>(blockIdx.y) * kWarp, h = head0 + lane;
  const MixerChunk chunk = m.chunks[c];
  const bool mine = h < s.H;
  for (int j = warp; j < kWarp && head0 + j < s.H; j += kWarps) {
    for (int i = lane; i < S && chunk.tokens > 0; i += kWarp) {
      float sum = 0;
      for (int block = 0; block < g.blocks; ++block) {
        const int64_t head_block = (int64_t{c} * s.H + head0 + j) * g.blocks + block;
        sum += d.later_angle[head_block * S + i];
      }
      later[j * (S + 1) + i] = sum;
    }
  }
  __syncthreads();
  float d_bias = 0;
  const auto finish = [&](int t, float d_gamma, float d_carry, float d_rest) {
    const bf16* row = proj.at(chunk, t);
    bf16* to = d_proj.at(chunk, t);
    const float raw = to_float(row[s.dd_dt() + h]) + m.w.dt_bias[h];
    const float lam = sigmoid(to_float(row[s.trap() + h]));
    const float d_dt = fmaf(lam, d_gamma, fmaf(1 - lam, d_carry, d_rest));
    const float d_raw = d_dt * sigmoid(raw);
    to[s.dd_dt() + h] = from_float<bf16>(d_raw);
    to[s.trap() + h] = from_float<bf16>(softplus(raw) * (d_gamma - d_carry) * lam * (1 - lam));
    d_bias += d_raw;
  };
  for (int t = warp; mine && t < chunk.tokens; t += kWarps) {
    float d_log_decay = 0, d_gamma = 0, d_scale = 0, d_rest = 0, d_before = 0;
    for (int block = 0; block < g.blocks; ++block) {
      const TermGradients& from = d.terms[(int64_t{c} * s.H + h) * g.blocks + block];
      d_log_decay += from.log_decay[t];
      d_gamma += from.gamma[t];
      d_scale += from.scale[t];
      d_rest += from.dt[t];
      if (t > 0) {
        d_before += from.scale[t - 1];
      } else if (c > 0 && !chunk.first) {
        d_before += (&from - s.H * g.blocks)->scale[m.Q - 1];  // the chunk before is full
      }
    }
    if (t == 0 && chunk.first && d.d_carry) d_before = d.d_carry[int64_t{c} * s.H + h];
    d_gamma += d_scale;
    const float* theta = m.theta + (int64_t{c} * m.Q + t) * S;
    for (int i = 0; i < S; ++i) d_rest = fmaf(theta[i], later[lane * (S + 1) + i], d_rest);
    const float dt = g.terms_of(c, h)->dt[t * static_cast<int>(s.R)],
                raw = to_float(proj.at(chunk, t)[s.dd_A() + h]);
    const float act = decay_act(s.decay_act, raw);
    const float slope = decay_act_derivative(s.decay_act, raw);
    d_proj.at(chunk, t)[s.dd_A() + h] =
        from_float<bf16>(act > s.A_floor ? -slope * dt * d_log_decay : 0.0f);
    d_rest = fmaf(-fmaxf(act, s.A_floor), d_log_decay, d_rest);
    if (t == 0 && c == 0 && !chunk.first) {
      pending.gamma[h] = d_gamma;
      pending.rest[h] = d_rest;
    } else {
      finish(t, d_gamma, d_before, d_rest);
    }
    if (t + 1 == chunk.tokens && c + 1 == m.count && !chunk.last) {
      finish(t + 1, waiting.gamma[h], d_scale, waiting.rest[h]);
    }
  }
  sums[warp][lane] = d_bias;
  __syncthreads();
  if (warp > 0 || !mine) return;
  for (int i = 1; i < kWarps; ++i) d_bias += sums[i][lane];
  d.d_dt_bias[int64_t{c} * s.H + h] = d_bias;
}

TileGradients take_gradients(const MixerShape& s, int64_t count, int64_t heads_each,
                             bool with_initial, bf16* states, bf16* d_states, ScratchScope& scope) {
  const int64_t blocks = s.P / kTileChannels, heads = count * s.H * blocks;
  const int64_t ranks = s.mimo ? count * s.H * s.R * s.P : 0;
  const auto take = [&](int64_t n) { return scope.take<float>(n).data(); };
  return {.states = states,
          .d_states = d_states,
          .terms = scope.take<TermGradients>(heads).data(),
          .heads_each = static_cast<int>(heads_each),
          .row_heads = static_cast<int>(s.H * blocks / heads_each),
          .rows = scope.take<bf16>(heads / heads_each * kTileRows * (2 * s.N + s.S)).data(),
          .later_angle = take(heads * s.S),
          .d_D = take(heads),
          .d_biases = {take(heads * s.R * s.N), take(heads * s.R * s.N)},
          .d_mimo_x = take(ranks),
          .d_mimo_z = take(ranks),
          .d_mimo_o = take(ranks),
          .d_carry = with_initial ? take(count * s.H) : nullptr,
          .d_dt_bias = take(count * s.H),
          .d_norms = {take(count * kRowGroups * s.N), take(count * kRowGroups * s.N)}};
}

// Of a block of chunk_backward, and whether Z has a place of its own in it.
struct BackwardBlock {
  size_t bytes;
  bool place_for_d_state;
};
template <int kN, int kS, int kR>
BackwardBlock backward_block(const Stream& stream) {
  constexpr size_t kLeast = sizeof(BackwardShared<kN, kS, kR>);
  constexpr size_t kMore = kLeast + kTileChannels * kN * sizeof(bf16);
  constexpr size_t kReserved = 1024;  // of each block, and what a multiprocessor has beyond a block
  const bool two_fit = 2 * (kMore + kReserved) <= stream.shared_memory + kReserved;
  return two_fit ? BackwardBlock{kMore, true} : BackwardBlock{kLeast, false};
}

}  // namespace

bool mixer_scan_backward_fits_tiles(const Stream& stream, const MixerShape& s) {
  size_t bytes = 0;
  visit_tiles(s, [&]<int kN, int kS, int kR>() { bytes = sizeof(BackwardShared<kN, kS, kR>); });
  return bytes <= stream.shared_memory;
}

void mixer_scan_backward_tiles(Context& ctx, const MixerScanBackwardArgs& args) {
  const MixerShape& s = args.shape;
  ScratchScope scope(ctx.scratch);
  const MixerChunks chunks =
      list_chunks(ctx, kOp, args.proj, args.cu_seqlens, kTileRows / s.R, scope);
  if (chunks.count == 0) return;
  const int64_t slots = kSpanBlocks * ctx.stream->multiprocessors;
  const int64_t heads_each = mixer_scan_backward_heads(s, args.heads, chunks.count, slots);
  const int64_t size = mixer_scan_tiles_segment(s, heads_each, chunks.count, chunks.per_sequence);
  const int64_t whole =
      chunks.per_sequence > 0 && size % chunks.per_sequence == 0 ? chunks.per_sequence : 0;
  const int64_t length = mixer_scan_span(size, whole, 2 * s.d_inner() / kTileChannels, slots);
  MixerTiles tiles = take_tiles(s, args.params, chunks, length, size, /*backward=*/true, scope);
  const int64_t elements = size * s.H * s.P * s.N;
  bf16* const states = scope.take<bf16>(elements).data();
  bf16* const d_states = scope.take<bf16>(elements).data();
  const bool with_initial = !args.initial.empty(), with_d_state = !args.d_state.empty();
  const TileGradients d =
      take_gradients(s, size, heads_each, with_initial, states, d_states, scope);
  const int64_t angles = s.H * tiles.blocks * s.S;
  if (with_initial || with_d_state) {
    tiles.d_initial = scope.take<float>(chunks.sequences * s.H * s.P * s.N).data();
  }
  float* const ends = with_d_state ? scope.take<float>(chunks.sequences * angles).data() : nullptr;
  float *angle_in = scope.take<float>(angles).data(), *angle_out = scope.take<float>(angles).data();
  const auto take_pending = [&] {
    return Pending{scope.take<float>(s.H).data(), scope.take<float>(s.H).data()};
  };
  Pending waiting = take_pending(), pending = take_pending();

  const MixerRows<const bf16> proj(args.proj), d_y(args.d_y);
  const MixerRows<bf16> d_proj(args.d_proj);
  const MixerPool<float> pool(args.initial), d_pool(args.d_state);
  const auto add = [&](const float* rows, int64_t count, const View& total) {
    add_rows_to(ctx, kOp, rows, count, total.size(), data<float>(total));
  };
  fill_tiles(ctx, kOp, tiles, chunks, length, size, args.proj, args.initial, /*finish=*/false);
  find_incoming(ctx, kOp, tiles, chunks, args.proj, &args.d_y, args.initial, args.d_state);
  for (int64_t i = (chunks.count - 1) / size; i >= 0; --i) {
    const MixerTiles g = part_of(tiles, chunks, i * size, size);
    part_states(ctx, kOp, tiles, g, args.proj, args.d_y, args.initial, args.d_state, states,
                d_states);
    const int64_t count = g.m.count;
    const dim3 heads(static_cast<unsigned>(s.H), static_cast<unsigned>(count));
    const dim3 row_heads(static_cast<unsigned>(s.H * g.blocks / heads_each),
                         static_cast<unsigned>(count));
    visit_tiles(s, [&]<int kN, int kS, int kR>() {
      const BackwardBlock block = backward_block<kN, kS, kR>(*ctx.stream);
      launch(ctx, kOp, chunk_backward<kN, kS, kR>,
             {.blocks = row_heads, .threads = kThreads, .shared_bytes = block.bytes}, g, d, proj,
             d_y, d_proj, block.place_for_d_state);
      if (!with_d_state) return;
      launch(ctx, kOp, final_backward<kN, kS, kR>, {.blocks = row_heads, .threads = kN / 2}, g, d,
             d_proj, d_pool, ends);
    });
    if (s.S > 0) {
      sum_later_chunks(ctx, kOp, g, chunks, d.later_angle, angles, angle_in, angle_out, ends);
    }
    if (tiles.d_initial) {
      launch(ctx, kOp, initial_backward, {.blocks = heads, .threads = kThreads}, g, d, pool, d_pool,
             ends);
    }
    visit_ranks(s, [&]<int kN, int kR>() {
      launch(ctx, kOp, heads_backward<kN, kR>,
             {.blocks = static_cast<unsigned>(count * kRowGroups), .threads = kThreads}, g, d, proj,
             d_proj);
    });
    launch(ctx, kOp, terms_backward,
           {.blocks = {static_cast<unsigned>(count), blocks_for(s.H, kWarp)},
            .threads = kThreads,
            .shared_bytes = static_cast<size_t>(kWarp * (s.S + 1)) * sizeof(float)},
           g, d, proj, d_proj, waiting, pending);
    add(d.d_D, count * g.blocks, args.d_params.D);
    add(d.d_biases[0], count * g.blocks, args.d_params.B_bias);
    add(d.d_biases[1], count * g.blocks, args.d_params.C_bias);
    if (s.mimo) {
      add(d.d_mimo_x, count, args.d_params.mimo_x);
      add(d.d_mimo_z, count, args.d_params.mimo_z);
      add(d.d_mimo_o, count, args.d_params.mimo_o);
    }
    add(d.d_dt_bias, count, args.d_params.dt_bias);
    add(d.d_norms[0], count * kRowGroups, args.d_params.B_norm);
    add(d.d_norms[1], count * kRowGroups, args.d_params.C_norm);
    std::swap(angle_in, angle_out);
    std::swap(waiting, pending);
  }
}

}  // namespace mamba3::cuda
