// The forward of the Mamba-3 scan on tensor cores; see mixer_tiles.cuh. A block of 4 warps walks
// the chunks of a span for 64 channels of a head. Each warp has 16 rows of what is computed: of the
// queries, of the outputs, and of the state, which stays in registers in f32. For each chunk:
//
//      copies of B, C, x arrive (those of the next chunk are asked for as soon as their place is
//      free)
//      q = rotated C, into registers       k = rotated B, in place       S, rounded
//      y = exp(c_t) q S^T
//      y += W v        W, 16 keys at a time, from q k^T; those above the diagonal are skipped
//      S = exp(c_Q) S + (v to_end)^T k
//      y, with skip, norm and gate, to memory

#include <algorithm>

#include "cuda/mixer_tiles.cuh"
#include "ops/mixer_scan.h"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "mixer_scan";
constexpr int kThreads = 256;

// MIMO has the values of one chunk, and x of two, from which they are made.
template <int kN, int kR>
struct ScanShared {
  static constexpr int kInputs = kTileRows / kR * kTileChannels;
  bf16 keys[2][kTileRows * kN];
  bf16 queries[kTileRows * kN];
  bf16 state[kTileChannels * kN];  // each warp writes its rows
  bf16 gates[kInputs];             // and reads those that it has asked for
  bf16 values[kR == 1 ? 2 : 1][kTileRows * kTileChannels];
  bf16 x[2][kR == 1 ? 64 : kInputs];
  ChunkTerms terms[2];
  SharedBiases<kN, kR> biases;
};

// The norm over the channels of a head, which are those of one block.
__device__ void norm_outputs(FragmentC (&y)[kTileChannels / 8], const float* weight, float eps) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares = 0;
#pragma unroll
    for (const FragmentC& tile : y) {
      const float a = tile.at[2 * half], b = tile.at[2 * half + 1];
      squares = fmaf(a, a, fmaf(b, b, squares));
    }
    squares += __shfl_xor_sync(~0u, squares, 1);  // the 4 lanes that share a row
    squares += __shfl_xor_sync(~0u, squares, 2);
    const float rstd = rsqrtf(squares / kTileChannels + eps);
#pragma unroll
    for (int i = 0; i < kTileChannels / 8; ++i) {
      y[i].at[2 * half] *= rstd * weight[8 * i];
      y[i].at[2 * half + 1] *= rstd * weight[8 * i + 1];
    }
  }
}

// y_r *= mimo_o silu(z mimo_z), for the lane's rows and columns.
template <int kR>
__device__ void gate_ranks(FragmentC (&y)[kTileChannels / 8],
                           const SharedTile<kTileChannels>& z_tokens, const float* gate,
                           const float* down, int row) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTileChannels / 8; ++i) {
    const float2 g = *reinterpret_cast<const float2*>(gate + 8 * i);
    const float2 o = *reinterpret_cast<const float2*>(down + 8 * i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 z = unpack_bf16(z_tokens.load2((row + 8 * half) / kR, 8 * i, column));
      const float a = z.x * g.x, b = z.y * g.y;
      y[i].at[2 * half] *= o.x * (a * fast_sigmoid(a));
      y[i].at[2 * half + 1] *= o.y * (b * fast_sigmoid(b));
    }
  }
}

template <int kN, int kS, int kR>
__global__ void __launch_bounds__(kSpanThreads, kSpanBlocks)
    scan_spans(MixerTiles g, MixerRows<const bf16> proj, MixerRows<bf16> out, MixerStatePool pool) {
  MAMBA3_DYNAMIC_SHARED(__align__(1024) char, memory);
  auto& shared = *reinterpret_cast<ScanShared<kN, kR>*>(memory);
  const MixerSegment& m = g.m;
  const MixerShape& s = m.s;
  const HeadBlock head(g);
  if (head.index >= g.span_offsets[m.sequences]) return;
  const MixerSpan span = g.spans[head.index];
  const int h = head.h, group = h / static_cast<int>(s.H / s.G);
  const int64_t channel = h * s.P + head.block * kTileChannels;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, column = lane % 4 * 2;
  // Warps with later rows have more keys to see. Blocks take turns in which warp that is, also
  // those that are on a multiprocessor together, whose numbers are about 132 apart.
  const int block_turn = static_cast<int>(blockIdx.x + blockIdx.x / 128);
  const int turn_of_warp = (static_cast<int>(threadIdx.x) / kWarp + block_turn) % 4;
  const int row = turn_of_warp * 16, my_row = row + lane / 4;
  const float D = m.w.D[h];
  constexpr int kQ = kTileRows / kR, kWarpTokens = kWarpRows / kR;

  // Rows from the chunk of the loop on.
  int present = span.rows;
  bf16* y_row = out.at(m.chunks[span.begin], my_row / kR) + channel + column;
  // Of z a lane copies 16 bytes of every fourth of the warp's tokens.
  const int z_first = row / kR + lane / 8, z_piece = lane % 8 * 8;
  const bf16* z_row = proj.at(m.chunks[span.begin], z_first) + s.z() + channel + z_piece;

  const SharedTile<kN> queries{shared_address(shared.queries)};
  const SharedTile<kN> state_tile{shared_address(shared.state)};
  const SharedTile<kTileChannels> gates{shared_address(shared.gates)};
  const auto keys_of = [&](int c) { return SharedTile<kN>{shared_address(shared.keys[c % 2])}; };
  const auto values_of = [&](int c) {
    return SharedTile<kTileChannels>{shared_address(shared.values[kR == 1 ? c % 2 : 0])};
  };
  const auto x_of = [&](int c) {
    return kR == 1 ? values_of(c) : SharedTile<kTileChannels>{shared_address(shared.x[c % 2])};
  };
  TileCopy<kN, __half> copy_normed(g.normed_of(span.begin, 0, group), g.normed_stride());
  TileCopy<kTileChannels, const bf16, kSpanThreads, kQ> copy_x(
      proj.at(m.chunks[span.begin], 0) + s.x() + channel, proj.token_stride);
  const ChunkTerms* terms_from = g.terms_of(span.begin, h);
  const auto prefetch = [&](int c, int count) {
    copy_normed(keys_of(c));
    copy_normed.from += s.G * kN;  // from B to C
    copy_normed(queries);
    copy_normed.from += kTileRows * copy_normed.stride - s.G * kN;
    copy_x(x_of(c), count / kR);
    copy_x.move(1);
    copy_terms(shared.terms[c % 2], terms_from);
    terms_from += s.H;
  };
  const auto prefetch_gates = [&](int count) {
#pragma unroll
    for (int i = 0; i < kWarpTokens; i += 4) {
      if (kWarpTokens < 4 && lane / 8 >= kWarpTokens) break;
      copy_async(gates.at(z_first + i, z_piece), z_row + i * proj.token_stride,
                 (z_first + i) * kR < count ? 16 : 0);
    }
    z_row += kQ * proj.token_stride;
  };

  prefetch(span.begin, present);
  commit_copies();
  shared.biases.fill(m, h);
  StateFragments<kN, kR> state{.row0 = row, .tile = {}};
  begin_span(g, span, head, pool, state);
  AngleSteps<kS, kR> steps;
  steps.load(g, span.begin, h, row);

  for (int c = span.begin; c < span.end; ++c) {
    const SharedTile<kN> keys = keys_of(c);
    const SharedTile<kTileChannels> values = values_of(c);
    const ChunkTerms& terms = shared.terms[c % 2];
    const SharedRotary<kS, kR> rotary{keys_of(c + 1).base};
    wait_copies<0>();
    __syncthreads();
    prefetch_gates(present);
    commit_copies();

    rotary.fill(steps, terms, row);
    __syncwarp();
    FragmentA q[kN / 16], k[kN / 16];
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      k[i] = keys.a(row, 16 * i);
      q[i] = queries.a(row, 16 * i);
      turn<true, true>(&k[i], &q[i], 16 * i, shared.biases, rotary, row);
    }
    __syncwarp();  // lanes have read each other's places
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) keys.store_a(row, 16 * i, k[i]);
    if constexpr (kR > 1) {
      expand_values<kR>(values, x_of(c), rank_of(m.w.mimo_x, s, head), s.P, row);
    }
    state.store(state_tile);
    publish_tiles();
    __syncthreads();
    if (c + 1 < span.end) prefetch(c + 1, present - kTileRows);
    commit_copies();

    const float from_start[2] = {terms.from_start[my_row], terms.from_start[my_row + 8]};
    const float c_i[2] = {terms.c[my_row], terms.c[my_row + 8]};
    const auto add_from_start = [&](FragmentC(&y)[kTileChannels / 8]) {
#pragma unroll
      for (FragmentC& tile : y) {
#pragma unroll
        for (int j = 0; j < 4; ++j) tile.at[j] *= from_start[j / 2];
      }
    };
    // W of two tiles of scores, from `key` on.
    const auto weights_of = [&]<bool kDiagonal>(const FragmentC& left, const FragmentC& right,
                                                int key) {
      FragmentC weights[2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int j = key + 8 * tile + column;
        const float2 c_j = *reinterpret_cast<const float2*>(&terms.c[j]);
        const float2 scale_j = *reinterpret_cast<const float2*>(&terms.scale[j]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // Above the diagonal the exponent may be large; it is not used.
          float weight = fast_exp2(c_i[e / 2] - (e % 2 ? c_j.y : c_j.x));
          weight *= e % 2 ? scale_j.y : scale_j.x;
          if constexpr (kDiagonal) {
            // Tokens since the key.
            const int behind = (my_row + e / 2 * 8) / kR - (j + e % 2) / kR;
            weight = behind > 0 ? weight : behind == 0 ? terms.gamma[j + e % 2] : 0.0f;
          }
          weights[tile].at[e] = (tile ? right : left).at[e] * weight;
        }
      }
      return as_a(weights[0], weights[1]);
    };
    FragmentC y[kTileChannels / 8] = {};
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    FragmentC scores[kTileRows / 8];
    begin_products();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      multiply_async<false>(scores, q[i], columns_of(keys, 16 * i), i > 0);
    }
    commit_products();
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
      multiply_async<false>(y, q[i], columns_of(state_tile, 16 * i), i > 0);
    }
    commit_products();
    state.scale(terms.from_start[kTileRows - 1]);
    wait_products<1>();
    FragmentA weights[kTileRows / 16];
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      weights[i] = {};
      if (16 * i <= row) {
        weights[i] = weights_of.template operator()<true>(scores[2 * i], scores[2 * i + 1], 16 * i);
      }
    }
    wait_products<0>();
    add_from_start(y);
    begin_products();
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      multiply_async<true>(y, weights[i], rows_of(values, 16 * i), true);
    }
    commit_products();
    if (c + 1 < span.end) steps.load(g, c + 1, h, row);
    state.add(values, keys, terms.to_end);
    wait_products<1>();  // y; the state while it goes to memory
#else
#pragma unroll
    for (int i = 0; i < kN / 16; ++i) {
#pragma unroll
      for (int p = 0; p < kTileChannels; p += 16) {
        const auto b = state_tile.b_transposed(p, 16 * i);
        mma(y[p / 8], q[i], b.left);
        mma(y[p / 8 + 1], q[i], b.right);
      }
    }
    add_from_start(y);
    const auto add_keys = [&]<bool kDiagonal>(int key) {
      // Sums over even and odd steps apart: twice as many independent products.
      FragmentC scores[2][2] = {};
#pragma unroll
      for (int i = 0; i < kN / 16; ++i) {
        const auto b = keys.b_transposed(key, 16 * i);
        mma(scores[i % 2][0], q[i], b.left);
        mma(scores[i % 2][1], q[i], b.right);
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[0][tile].at[e] += scores[1][tile].at[e];
      }
      const FragmentA a =
          weights_of.template operator()<kDiagonal>(scores[0][0], scores[0][1], key);
#pragma unroll
      for (int p = 0; p < kTileChannels; p += 16) {
        const auto b = values.b(key, p);
        mma(y[p / 8], a, b.left);
        mma(y[p / 8 + 1], a, b.right);
      }
    };
    for (int key = 0; key < row; key += 16) add_keys.template operator()<false>(key);
    add_keys.template operator()<true>(row);

    if (c + 1 < span.end) steps.load(g, c + 1, h, row);
    state.scale(terms.from_start[kTileRows - 1]);
    state.add(values, keys, terms.to_end);
#endif
    const bool here[2] = {my_row < present, my_row + 8 < present};

#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kTileChannels / 8; ++i) {
        const float2 skipped = unpack_bf16(values.load2(my_row + 8 * half, 8 * i, column));
        y[i].at[2 * half] = fmaf(D, skipped.x, y[i].at[2 * half]);
        y[i].at[2 * half + 1] = fmaf(D, skipped.y, y[i].at[2 * half + 1]);
      }
    }
    if (m.w.norm) norm_outputs(y, m.w.norm + h * s.P + column, s.eps);
    wait_copies<1>();  // all but those for the next chunk
    __syncwarp();
    if constexpr (kR == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        bf16* to = y_row + half * 8 * out.token_stride;
#pragma unroll
        for (int i = 0; i < kTileChannels / 8; ++i) {
          const float2 gate = unpack_bf16(gates.load2(my_row + 8 * half, 8 * i, column));
          const float a = y[i].at[2 * half] * (gate.x * fast_sigmoid(gate.x));
          const float b = y[i].at[2 * half + 1] * (gate.y * fast_sigmoid(gate.y));
          if (here[half]) *reinterpret_cast<uint32_t*>(to + 8 * i) = pack_bf16(a, b);
        }
      }
    } else {
      gate_ranks<kR>(y, gates, rank_of(m.w.mimo_z, s, head, my_row % kR) + column,
                     rank_of(m.w.mimo_o, s, head, my_row % kR) + column, my_row);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        using Sums = RankSums<kR, kTileChannels / 8>;
        float2 sums[kTileChannels / 8];
#pragma unroll
        for (int i = 0; i < kTileChannels / 8; ++i) {
          sums[i] = {y[i].at[2 * half], y[i].at[2 * half + 1]};
        }
        const int tile = Sums::run(sums);
        bf16* to = y_row + half * 8 / kR * out.token_stride + 8 * tile;
#pragma unroll
        for (int i = 0; i < Sums::kLeft; ++i) {
          const uint32_t both = pack_bf16(sums[i].x, sums[i].y);
          if (here[half]) *reinterpret_cast<uint32_t*>(to + 8 * i) = both;
        }
      }
    }
    state.finish();
    present -= kTileRows;
    y_row += kQ * out.token_stride;
  }

  const MixerChunk last = m.chunks[span.end - 1];
  if (last.last && !pool.empty()) {
    const int64_t to = head.state_at(m, pool.pool.rows[last.sequence]);
    state.for_each([&](float& value, int p, int n) { pool.set_ssm(to + p * kN + n, value); });
  }
}

// k_prev and v_prev of the sequences, whose final angles are in the pool: blockIdx.y is the
// sequence, and a thread turns one pair of a head.
__global__ void __launch_bounds__(kThreads)
    finish_sequences(MixerSegment m, MixerRows<const bf16> proj, MixerPool<float> pool) {
  const MixerShape& s = m.s;
  const int sequence = static_cast<int>(blockIdx.y);
  if (m.offsets[sequence] == m.offsets[sequence + 1]) return;
  const int c = m.offsets[sequence + 1] - 1;
  const MixerChunk chunk = m.chunks[c];
  const bf16* token = proj.at(chunk, chunk.tokens - 1);
  const int64_t row = pool.rows[sequence];
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < s.H * s.P) pool.v_prev[row * s.H * s.P + index] = to_float(token[s.x() + index]);
  const int64_t parts = s.N - s.S, i = index % parts, h = index / parts % s.H;
  const int64_t r = index / parts / s.H;
  if (r >= s.R) return;
  const RotaryPart part = rotary_part(s, static_cast<int>(i));
  const int64_t group = h / (s.H / s.G), last_row = (chunk.tokens - 1) * s.R + r;
  const float rstd = m.rstd[(int64_t{c} * kTileRows + last_row) * 2 * s.G + group];
  const auto value = [&](int n) {
    return fmaf(to_float(token[s.B() + (r * s.G + group) * s.N + n]) * rstd, m.w.B_norm[n],
                m.w.B_bias[(h * s.R + r) * s.N + n]);
  };
  float* k_prev = pool.k_prev + k_prev_row(s, row * s.H + h, static_cast<int>(r)) * s.N;
  const float a = value(part.a);
  if (!part.pair) {
    k_prev[part.a] = a;
    return;
  }
  float cosine, sine;
  sincosf(pool.angle[(row * s.H + h) * s.S + i], &sine, &cosine);
  const float b = value(part.b);
  k_prev[part.a] = a * cosine - b * sine;
  k_prev[part.b] = a * sine + b * cosine;
}

}  // namespace

void mixer_scan_tiles(Context& ctx, const MixerScanArgs& args) {
  const MixerShape& s = args.shape;
  ScratchScope scope(ctx.scratch);
  const MixerChunks chunks =
      list_chunks(ctx, kOp, args.proj, args.cu_seqlens, kTileRows / s.R, scope);
  if (chunks.count == 0) return;
  const int64_t length =
      mixer_scan_span(chunks.count, chunks.per_sequence, s.d_inner() / kTileChannels,
                      kSpanBlocks * ctx.stream->multiprocessors);
  const MixerTiles tiles =
      take_tiles(s, args.params, chunks, length, chunks.count, /*backward=*/false, scope);
  fill_tiles(ctx, kOp, tiles, chunks, length, chunks.count, args.proj, args.state, true);
  find_incoming(ctx, kOp, tiles, chunks, args.proj, nullptr, args.state, {});
  const MixerRows<const bf16> proj(args.proj);
  const MixerStatePool pool = state_pool(args.state);
  visit_tiles(s, [&]<int kN, int kS, int kR>() {
    launch(ctx, kOp, scan_spans<kN, kS, kR>,
           {.blocks = static_cast<unsigned>(tiles.span_count * s.H * tiles.blocks),
            .threads = kSpanThreads,
            .shared_bytes = sizeof(ScanShared<kN, kR>)},
           tiles, proj, MixerRows<bf16>(args.y), pool);
  });
  if (!args.state.empty()) {
    launch(ctx, kOp, finish_sequences,
           {.blocks = {blocks_for(s.H * std::max(s.P, s.R * (s.N - s.S)), kThreads),
                       static_cast<unsigned>(chunks.sequences)},
            .threads = kThreads},
           tiles.m, proj, pool.pool);
  }
}

}  // namespace mamba3::cuda
