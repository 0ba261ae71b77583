// The schedule is in mixer_walk.cuh. A chunk of the forward has four phases:
//   1. decays, keys and queries after norm and bias, angles, values
//   2. keys and queries turned
//   3. W from q k^T; exp(c_t) S q
//   4. y; the state after the chunk
// and what becomes of y shares the first phase of the next chunk.

#include <limits>

#include "cuda/mixer_walk.cuh"

namespace mamba3::cuda {

namespace {

constexpr const char* kOp = "mixer_scan";
constexpr int kThreads = 128;

template <typename T>
using ForwardWalk = Walk<T, kThreads>;

// The state of the pool before the first token, with what that adds for the last one of the call
// before; zero without a pool.
template <typename T, typename S>
__device__ void begin_state(const ForwardWalk<T>& walk, const MixerPool<S>& pool, double* angle) {
  const MixerShape& s = walk.s;
  const WalkSpace& m = walk.m;
  const int thread = static_cast<int>(threadIdx.x), h = walk.h;
  const int64_t row = pool.rows ? pool.rows[walk.sequence] : 0;
  for (int i = thread; i < s.S; i += kThreads) {
    angle[i] = pool.ssm ? static_cast<double>(pool.angle[(row * s.H + h) * s.S + i]) : 0.0;
  }
  if (!pool.ssm) return;
  const T* first = walk.in.proj.at(walk.whole, 0);
  const float carry = (1 - trapezoid(s, first, h)) * walk.dt_of(first);
  const int N = static_cast<int>(s.N), P = static_cast<int>(s.P);
  const S* ssm = pool.ssm + (row * s.H + h) * P * N;
  const float* v_prev = pool.v_prev + (row * s.H + h) * P;
  for (int i = thread; i < P * N; i += kThreads) {
    const int p = i / N, n = i % N;
    float state = to_float(ssm[i]);
    for (int r = 0; r < s.R; ++r) {
      state = fmaf(carry * v_prev[p] * walk.up(walk.w.mimo_x, r, p),
                   pool.k_prev[((row * s.R + r) * s.H + h) * N + n], state);
    }
    m.state[p * m.ldN + n] = state;
  }
}

// The state after the last chunk, whose keys are still there.
template <typename T, typename S>
__device__ void finish_state(const ForwardWalk<T>& walk, const MixerPool<S>& pool,
                             const double* angle, int last_tokens) {
  const MixerShape& s = walk.s;
  const WalkSpace& m = walk.m;
  const int thread = static_cast<int>(threadIdx.x), h = walk.h;
  const int N = static_cast<int>(s.N), P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  const int64_t row = pool.rows[walk.sequence], head = row * s.H + h;
  for (int i = thread; i < s.S; i += kThreads) {
    pool.angle[head * s.S + i] = static_cast<float>(angle[i]);
  }
  for (int i = thread; i < P * N; i += kThreads) {
    pool.ssm[head * P * N + i] = from_float<S>(m.state[i / N * m.ldN + i % N]);
  }
  for (int i = thread; i < R * N; i += kThreads) {
    const int r = i / N, n = i % N;
    pool.k_prev[((row * R + r) * s.H + h) * N + n] = m.k[((last_tokens - 1) * R + r) * m.ldN + n];
  }
  const T* x = walk.in.proj.at(walk.whole, walk.whole.tokens - 1) + s.x() + h * P;
  for (int p = thread; p < P; p += kThreads) pool.v_prev[head * P + p] = to_float(x[p]);
}

// out = sum_r mimo_o * norm(y_r) * silu(z * mimo_z).
template <typename T>
__device__ void gate(const ForwardWalk<T>& walk, const MixerChunk& part, const MixerRows<T>& out,
                     float* rstd) {
  const MixerShape& s = walk.s;
  const MixerWeights& w = walk.w;
  const WalkSpace& m = walk.m;
  const int h = walk.h, P = static_cast<int>(s.P), R = static_cast<int>(s.R);
  if (s.out_norm) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int row = static_cast<int>(threadIdx.x) / kWarp; row < part.tokens * R;
         row += kThreads / kWarp) {
      float squares = 0;
      for (int p = lane; p < P; p += kWarp) {
        squares = fmaf(m.y[row * m.ldP + p], m.y[row * m.ldP + p], squares);
      }
      squares = warp_sum(squares);
      if (lane == 0) rstd[row] = rsqrtf(squares / static_cast<float>(P) + s.eps);
    }
    __syncthreads();
  }
  const TokenRows<const T> rows(walk.in.proj, part);
  const TokenRows<T> to(out, part);
  load_ahead<kThreads>(
      static_cast<int>(threadIdx.x), kWalkRows / R * P,
      [&](int i) { return to_float(rows.at(min(i / P, part.tokens - 1))[s.z() + h * P + i % P]); },
      [&](int i, float z) {
        const int t = i / P, p = i % P;
        if (t >= part.tokens) return;
        float sum = 0;
        for (int r = 0; r < R; ++r) {
          float y = m.y[(t * R + r) * m.ldP + p];
          if (s.out_norm) y *= rstd[t * R + r] * w.norm[h * P + p];
          sum = fmaf(y * walk.up(w.mimo_o, r, p), silu(z * walk.up(w.mimo_z, r, p)), sum);
        }
        to.at(t)[h * P + p] = from_float<T>(sum);
      });
}

// A block a head of a sequence.
template <int kN, int kP, int kR, typename T, typename S>
__global__ void __launch_bounds__(kThreads, 5)
    walk_forward(WalkInputs<T> in, MixerRows<T> out, MixerPool<S> pool) {
  MAMBA3_DYNAMIC_SHARED(float4, shared);
  __shared__ double angle[kWalkChannels / 2];
  __shared__ float rstd[kWalkRows];
  const MixerShape s = known_shape<kN, kP, kR>(in.s);
  const MixerWeights w = known_weights<kR>(in.w);
  const WalkSpace m(s, false, reinterpret_cast<float*>(shared));
  const ForwardWalk<T> walk(in, s, w, m, blockIdx.x);
  if (walk.whole.tokens == 0) return;
  m.clear();
  __syncthreads();
  walk.begin_turns();
  begin_state(walk, pool, angle);
  __syncthreads();

  const int chunks = walk.chunks();
  for (int i = 0; i < chunks; ++i) {
    const MixerChunk part = walk.chunk(i);
    if (threadIdx.x / kWarp == 0) walk.load_terms(part);
    walk.load_keys(part, true);
    walk.load_angles(part, angle, angle, nullptr);
    walk.load_values(part);
    __syncthreads();

    walk.turn_keys(part, true);
    __syncthreads();

    WalkTurn<kThreads> scores;
    scores.spread_tiles(kWalkRows, kWalkRows, [&](WalkTile& tile) {
      tile.add_dots(m.q, m.ldN, m.k, m.ldN, m.N);
      tile.each([&](float score, int row, int col) {
        m.weights[row * kWalkStride + col] = score * walk.weight_of(row, col);
      });
    });
    scores.spread_tiles(kWalkRows, m.P, [&](WalkTile& tile) {
      tile.add_dots(m.q, m.ldN, m.state, m.ldN, m.N);
      tile.each(
          [&](float sum, int row, int col) { m.y[row * m.ldP + col] = m.from_start[row] * sum; });
    });
    __syncthreads();

    WalkTurn<kThreads> outputs;
    const float D = walk.w.D[walk.h];
    outputs.tiles(kWalkRows, m.P, [&](WalkTile& tile) {
      tile.add(m.weights, kWalkStride, m.v, m.ldP, kWalkRows);
      tile.add_scaled(1, m.y, m.ldP);
      tile.add_scaled(D, m.v, m.ldP);
      tile.store(m.y, m.ldP);
    });
    walk.advance_state(outputs);
    __syncthreads();

    gate(walk, part, out, rstd);
    if (pool.ssm && part.last) finish_state(walk, pool, angle, part.tokens);
  }
}

}  // namespace

bool walks(const Context& ctx, const MixerShape& s, MixerSchedule schedule, int64_t sequences,
           std::initializer_list<View> views, bool backward) {
  for (const View& view : views) {
    if (view.stride(1) > std::numeric_limits<int32_t>::max()) return false;
  }
  constexpr int64_t kSums = 2048;  // more than a kernel has besides its space
  const int64_t bytes = WalkSpace(s, backward, nullptr).bytes() + kSums;
  return mixer_scan_walks(s, schedule, sequences, ctx.stream->multiprocessors, bytes,
                          static_cast<int64_t>(ctx.stream->shared_memory));
}

void mixer_scan_walk(Context& ctx, const MixerScanArgs& args, int64_t sequences) {
  const MixerShape& s = args.shape;
  const DType ssm = args.state.empty() ? DType::f32 : args.state.ssm.dtype;
  visit_activation(args.proj.dtype, [&]<typename T>() {
    visit_activation(ssm, [&]<typename S>() {
      visit_known(s, [&]<int kN, int kP, int kR>() {
        launch(ctx, kOp, walk_forward<kN, kP, kR, T, S>,
               {.blocks = {static_cast<unsigned>(sequences * s.H)},
                .threads = {kThreads},
                .shared_bytes = static_cast<size_t>(WalkSpace(s, false, nullptr).bytes())},
               walk_inputs<T>(s, args.params, args.proj, args.cu_seqlens, args.chunk),
               MixerRows<T>(args.y), MixerPool<S>(args.state));
      });
    });
  });
}

}  // namespace mamba3::cuda
