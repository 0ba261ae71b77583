// One token of every sequence, the state in place. Sizes of published models have a kernel of their
// own, mixer_step_head.cuh; this one takes any.
//
// The schedule: a block is one head of one sequence. It asks for its (P,N) state to be brought to
// the L2 cache, forms the key and query of the token meanwhile, and then reads and writes the state
// once, 16 bytes a thread where that is possible: a group of lanes takes a row p,
//   S_p = a S_p + sum_r before_rp k_prev_r + now_rp k_r,   y_rp = S_p . q_r
// with kRows rows of every group in flight. Nothing crosses blocks, so the pool needs no copies.

#include <algorithm>
#include <type_traits>

#include "cuda/mixer.cuh"
#include "cuda/mixer_step_head.cuh"
#include "ops/mixer_step.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // rows of the state that a group has in flight

// Floats that a block needs beside the state: k, q, k_prev (R,N), v, now, before, y (R,P), and a
// scale for every row of B, C and y; a multiple of 4.
constexpr int64_t vector_floats(const MixerShape& s) {
  return (3 * s.R * s.N + 4 * s.R * s.P + 3 * s.R + 3) / 4 * 4;
}

template <typename S, int kVector>
struct alignas(sizeof(S) * kVector) StateVector {
  S values[kVector];
};

// kVector floats, of which four at a time are aligned.
template <int kVector>
__device__ void load_floats(const float* from, float (&values)[kVector]) {
  if constexpr (kVector % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = from[i];
  }
}

// The sum of squares of a row, in every lane.
template <typename T>
__device__ float warp_square_sum(const T* row, int n) {
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < n; i += kWarp) {
    const float x = to_float(row[i]);
    sum = fmaf(x, x, sum);
  }
  return warp_sum(sum);
}

// T: proj and y; S: the state, read kVector elements at a time by groups of `lanes` lanes. The
// vectors of vector_floats() lie in shared memory, or in `spill` where they are too large for that.
template <typename T, typename S, int kVector>
__global__ void __launch_bounds__(kThreads)
    step_head(MixerShape s, MixerWeights w, const T* proj, int64_t proj_stride, T* y_out,
              int64_t y_stride, MixerPool<S> state, int lanes, float* spill) {
  MAMBA3_DYNAMIC_SHARED(float, shared);
  const int H = static_cast<int>(s.H), P = static_cast<int>(s.P), N = static_cast<int>(s.N);
  const int R = static_cast<int>(s.R), G = static_cast<int>(s.G), angles = static_cast<int>(s.S);
  const int h = static_cast<int>(blockIdx.x) % H;
  const int64_t b = blockIdx.x / H;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int64_t row = state.rows[b];

  S* ssm = state.ssm + (row * H + h) * P * N;
  for (int64_t i = thread * (128 / int{sizeof(S)}); i < int64_t{P} * N;
       i += kThreads * (128 / int{sizeof(S)})) {
    prefetch_line(ssm + i);
  }

  float* k = spill ? spill + blockIdx.x * vector_floats(s) : shared;
  float* q = k + R * N;
  float* k_prev = q + R * N;
  float* v = k_prev + R * N;
  float* now = v + R * P;       // weight of k_r in row p
  float* before = now + R * P;  // weight of k_prev_r in row p
  float* y = before + R * P;
  float* rstd = y + R * P;  // of B_r and C_r, then of y_r

  proj += b * proj_stride;
  const int g = h / (H / G);
  const float dt = softplus(to_float(proj[s.dd_dt() + h]) + w.dt_bias[h]);
  const float lam = trapezoid(s, proj, h);
  const float a = expf(-decay_rate(s, w, proj, h) * dt);

  for (int i = warp; i < 2 * R; i += kThreads / kWarp) {
    const T* raw = proj + (i < R ? s.B() : s.C()) + (i % R * G + g) * N;
    const float sum = warp_square_sum(raw, N);
    if (thread % kWarp == 0) {
      rstd[i] = s.bc_norm ? rsqrtf(sum / static_cast<float>(N) + s.eps) : 1.0f;
    }
  }
  for (int i = thread; i < R * N; i += kThreads) {
    k_prev[i] = state.k_prev[((row * R + i / N) * H + h) * N + i % N];
  }
  const T* x = proj + s.x() + h * P;
  float* v_prev = state.v_prev + (row * H + h) * P;
  for (int p = thread; p < P; p += kThreads) {
    const float x_p = to_float(x[p]), v_prev_p = v_prev[p];
    for (int r = 0; r < R; ++r) {
      const float up = w.mimo_x ? w.mimo_x[(h * R + r) * P + p] : 1.0f;
      v[r * P + p] = x_p * up;
      now[r * P + p] = lam * dt * x_p * up;
      before[r * P + p] = (1 - lam) * dt * a * v_prev_p * up;
      y[r * P + p] = 0;
    }
    v_prev[p] = x_p;
  }
  __syncthreads();

  for (int i = thread; i < N - angles; i += kThreads) {
    const RotaryPart part = rotary_part(s, i);
    float cosine = 1, sine = 0;
    if (part.pair) {
      float* angle = state.angle + (row * H + h) * angles + i;
      const float phi = reduced_angle(fmaf(theta_of(s, proj, i), angle_step(s, dt), *angle));
      *angle = phi;
      sincosf(phi, &sine, &cosine);
    }
    for (int r = 0; r < R; ++r) {
      const T* B = proj + s.B() + (r * G + g) * N;
      const T* C = proj + s.C() + (r * G + g) * N;
      const float* B_bias = w.B_bias ? w.B_bias + (h * R + r) * N : nullptr;
      const float* C_bias = w.C_bias ? w.C_bias + (h * R + r) * N : nullptr;
      const auto key = [&](int n) {
        return key_channel(to_float(B[n]), rstd[r], w.B_norm, B_bias, n);
      };
      const auto query = [&](int n) {
        return key_channel(to_float(C[n]), rstd[R + r], w.C_norm, C_bias, n);
      };
      const float k_a = key(part.a), q_a = query(part.a);
      if (part.pair) {
        const float k_b = key(part.b), q_b = query(part.b);
        k[r * N + part.a] = k_a * cosine - k_b * sine;
        k[r * N + part.b] = k_a * sine + k_b * cosine;
        q[r * N + part.a] = q_a * cosine - q_b * sine;
        q[r * N + part.b] = q_a * sine + q_b * cosine;
      } else {
        k[r * N + part.a] = k_a;
        q[r * N + part.a] = q_a;
      }
    }
  }
  __syncthreads();

  using Vector = StateVector<S, kVector>;
  const int groups = kThreads / lanes, lane = thread % lanes;
  // All lanes of a warp stay in the loops, for the sums over lanes.
  for (int column = 0; column < N; column += lanes * kVector) {
    const int n = column + lane * kVector;
    const bool in_row = n < N;
    for (int first = 0; first < P; first += groups * kRows) {
      const int my_row = first + thread / lanes;
      float values[kRows][kVector];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int p = my_row + u * groups;
        Vector loaded{};
        if (p < P && in_row) loaded = *reinterpret_cast<Vector*>(ssm + int64_t{p} * N + n);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[u][i] = a * to_float(loaded.values[i]);
      }
      for (int r = 0; r < R && in_row; ++r) {
        float k_n[kVector], k_prev_n[kVector];
        load_floats(k + r * N + n, k_n);
        load_floats(k_prev + r * N + n, k_prev_n);
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          const int p = min(my_row + u * groups, P - 1);
          const float before_p = before[r * P + p], now_p = now[r * P + p];
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            values[u][i] = fmaf(now_p, k_n[i], fmaf(before_p, k_prev_n[i], values[u][i]));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        const int p = my_row + u * groups;
        Vector stored;
#pragma unroll
        for (int i = 0; i < kVector; ++i) stored.values[i] = from_float<S>(values[u][i]);
        if (p < P && in_row) *reinterpret_cast<Vector*>(ssm + int64_t{p} * N + n) = stored;
      }
      for (int r = 0; r < R; ++r) {
        float q_n[kVector] = {};
        if (in_row) load_floats(q + r * N + n, q_n);
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          const int p = my_row + u * groups;
          float sum = 0;
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum = fmaf(values[u][i], q_n[i], sum);
          for (int i = lanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
          if (p < P && lane == 0) y[r * P + p] += sum;  // the row is this group's alone
        }
      }
    }
  }
  __syncthreads();

  for (int i = thread; i < R * P; i += kThreads) y[i] = fmaf(w.D[h], v[i], y[i]);
  for (int i = thread; i < R * N; i += kThreads) {
    state.k_prev[((row * R + i / N) * H + h) * N + i % N] = k[i];
  }
  __syncthreads();
  if (w.norm) {
    for (int r = warp; r < R; r += kThreads / kWarp) {
      const float sum = warp_square_sum(y + r * P, P);
      if (thread % kWarp == 0) rstd[2 * R + r] = rsqrtf(sum / static_cast<float>(P) + s.eps);
    }
    __syncthreads();
  }
  for (int p = thread; p < P; p += kThreads) {
    const float z = to_float(proj[s.z() + h * P + p]);
    float out = 0;
    for (int r = 0; r < R; ++r) {
      const int i = (h * R + r) * P + p;
      float y_r = y[r * P + p];
      if (w.norm) y_r *= rstd[2 * R + r] * w.norm[h * P + p];
      if (w.mimo_o) y_r *= w.mimo_o[i];
      out = fmaf(y_r, silu(w.mimo_z ? z * w.mimo_z[i] : z), out);
    }
    y_out[b * y_stride + h * P + p] = from_float<T>(out);
  }
}

template <typename T, typename S, int kVector>
void step(Context& ctx, const MixerStepArgs& args) {
  const MixerShape& s = args.shape;
  const int64_t B = args.proj.dim(0), floats = vector_floats(s);
  constexpr int64_t kSharedFloats = 48 * 1024 / sizeof(float);
  const bool fits = floats <= kSharedFloats;
  ScratchScope scope(ctx.scratch);
  float* spill = fits ? nullptr : scope.take<float>(B * s.H * floats).data();
  int lanes = 1;  // of a group: a power of two, no more than cover a row
  while (lanes < kWarp && lanes * kVector < s.N) lanes *= 2;
  launch(ctx, "mixer_step", step_head<T, S, kVector>,
         {.blocks = blocks_for(B * s.H, 1),
          .threads = kThreads,
          .shared_bytes = fits ? static_cast<size_t>(floats) * sizeof(float) : 0},
         s, MixerWeights(args.params), data<T>(args.proj), args.proj.stride(0), data<T>(args.y),
         args.y.stride(0), MixerPool<S>(args.state), lanes, spill);
}

// The block of a head, by what was fastest for many sequences; or two if heads are so few that
// multiprocessors would be idle.
template <typename S, int kR>
using WholeHead = std::conditional_t<kR == 1, StepTile<8, 1, sizeof(S) == 2 ? 3 : 2>,
                                     StepTile<sizeof(S) == 2 ? 4 : 8, 1, sizeof(S) == 2 ? 4 : 3>>;
using HalfHead = StepTile<8, 2, 1>;
// With an f32 state and several ranks two blocks are faster also when there are many heads.
using ManyHalfHeads = StepTile<4, 2, 5>;

// The sizes that step_known_head() is compiled for.
constexpr int64_t kKnownN = 128, kKnownP = 64, kKnownR = 4;

bool is_aligned(const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

bool is_known(const MixerStepArgs& args) {
  const MixerShape& s = args.shape;
  const MixerParams& p = args.params;
  const bool sizes = s.is_published() && s.N == kKnownN && s.P == kKnownP &&
                     (s.R == 1 || s.R == kKnownR) &&
                     std::max(args.proj.dim(0), s.G) <= 65535;  // the most blocks along y and z
  const View& proj = args.proj;
  // Four channels of B and C are read at a time.
  const bool rows = reinterpret_cast<uintptr_t>(proj.data) % (4 * size_of(proj.dtype)) == 0 &&
                    (proj.dim(0) == 1 || proj.stride(0) % 4 == 0);
  return sizes && rows && is_aligned(args.state.ssm) && is_aligned(args.state.k_prev) &&
         is_aligned(p.B_norm) && is_aligned(p.C_norm) && is_aligned(p.B_bias) &&
         is_aligned(p.C_bias);
}

template <typename T, typename S, int kR, typename Tile>
void launch_known(Context& ctx, const MixerStepArgs& args) {
  launch_overlapping(ctx, "mixer_step", step_known_head<T, S, kKnownN, kKnownP, kR, Tile>,
                     {.blocks = {blocks_for(args.shape.H * Tile::kSplit, args.shape.G),
                                 blocks_for(args.proj.dim(0), 1), blocks_for(args.shape.G, 1)},
                      .threads = Tile::kWarps * kWarp},
                     Tile::kSplit, args.shape, MixerWeights(args.params), data<T>(args.proj),
                     args.proj.stride(0), data<T>(args.y), args.y.stride(0),
                     MixerPool<S>(args.state));
}

template <typename T, typename S, int kR>
void step_known(Context& ctx, const MixerStepArgs& args) {
  // A norm adds over the rows of a head, which then are those of one block.
  const int64_t heads = args.proj.dim(0) * args.shape.H;
  const bool can_split = args.params.norm.empty() && can_overlap();
  if (can_split && 2 * heads <= ctx.stream->multiprocessors) {
    return launch_known<T, S, kR, HalfHead>(ctx, args);
  }
  if constexpr (kR > 1 && sizeof(S) == 4) {
    if (can_split) return launch_known<T, S, kR, ManyHalfHeads>(ctx, args);
  }
  launch_known<T, S, kR, WholeHead<S, kR>>(ctx, args);
}

}  // namespace

void mixer_step(Context& ctx, const MixerStepArgs& args) {
  visit_activation(args.proj.dtype, [&]<typename T>() {
    visit_activation(args.state.ssm.dtype, [&]<typename S>() {
      if (is_known(args)) {
        return args.shape.R == 1 ? step_known<T, S, 1>(ctx, args)
                                 : step_known<T, S, kKnownR>(ctx, args);
      }
      constexpr int kVector = 16 / sizeof(S);
      const bool aligned = is_aligned(args.state.ssm);
      if (aligned && args.shape.N % kVector == 0) {
        step<T, S, kVector>(ctx, args);
      } else {
        step<T, S, 1>(ctx, args);
      }
    });
  });
}

}  // namespace mamba3::cuda
