// Schedule. A thread has a pack of columns and walks down a few tokens with the inputs of the last
// W-1 in registers, so that each is read once, but for those before its first token; it asks for
// the inputs of several tokens at a time. Where a thread has a whole sequence, as in a step of
// decoding, it also keeps the state; else that is done by a kernel of its own, since other threads
// read the state's old values. Backward: the same walk also carries the gradients of the last W
// inputs, each complete once the token W-1 later was met, so a thread goes on for W-1 tokens. The
// threads of a block that have the same columns add up their parts of d_weight in order; those of
// all blocks are added by column_sums.cuh.

#include <numeric>

#include "cuda/column_sums.cuh"
#include "cuda/overlap.cuh"
#include "cuda/packed.cuh"
#include "ops/short_conv.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;               // tokens whose inputs are asked for together
constexpr int kTokens = 16, kPack = 4;  // tokens and columns of a thread of the forward
constexpr int kTokensBackward = 32, kPackBackward = 2;
constexpr int kTilesOfBlock = kThreads / kWarp;  // of kTokensBackward, one a warp
// Up to the usual width three blocks of the backward fit a multiprocessor's registers.
constexpr int kWidthOfThreeBlocks = 4;

// The exact exponential and division would take longer than the memory.
__device__ float fast_sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

// A view (B, T, X).
template <typename T>
struct Rows {
  T* data;
  int64_t batch, time;  // strides
};

template <typename T>
Rows<T> rows_of(const View& view) {
  return {data<T>(view), view.stride(0), view.stride(1)};
}

// What the forward and the backward have in common.
struct Shape {
  Sequences sequences;
  const float* weight;  // (C, W)
  const float* bias;    // (C), or null
  int64_t B, X, first, C;
};

template <typename Args>
Shape shape_of(const Args& args) {
  return {.sequences = sequences_of(args.cu_seqlens, args.in.dim(1)),
          .weight = data<float>(args.weight),
          .bias = data<float>(args.bias),
          .B = args.in.dim(0),
          .X = args.in.dim(2),
          .first = args.first,
          .C = args.weight.dim(0)};
}

// The weights and biases of n channels from c on.
template <int kW, int n>
struct Taps {
  float weight[kW][n], bias[n];

  __device__ Taps(const Shape& s, int64_t c) {
    float flat[kW][n];  // n W numbers that lie together, (n, W)
#pragma unroll
    for (int j = 0; j < kW; ++j) load(s.weight + c * kW + j * n, flat[j]);
#pragma unroll
    for (int j = 0; j < kW; ++j) {
#pragma unroll
      for (int i = 0; i < n; ++i) weight[j][i] = flat[(i * kW + j) / n][(i * kW + j) % n];
    }
#pragma unroll
    for (int i = 0; i < n; ++i) bias[i] = 0;
    if (s.bias != nullptr) load(s.bias + c, bias);
  }

  // The sum under the SiLU, from the inputs before, oldest first, and of the token itself.
  __device__ void sum(const float (&before)[kW - 1][n], const float (&x)[n], float (&y)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      y[i] = bias[i];
#pragma unroll
      for (int j = 0; j < kW - 1; ++j) y[i] += weight[j][i] * before[j][i];
      y[i] += weight[kW - 1][i] * x[i];
    }
  }
};

// Rows of packs move up by one, and x becomes the last.
template <int kRows, int n>
__device__ void push(float (&rows)[kRows][n], const float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j + 1 < kRows; ++j) rows[j][i] = rows[j + 1][i];
    rows[kRows - 1][i] = x[i];
  }
}

template <int n, typename T>
__device__ Pack<T, n>& pack_at(T* address) {
  return *reinterpret_cast<Pack<T, n>*>(address);
}
template <int n, typename T>
__device__ const Pack<T, n>& pack_at(const T* address) {
  return *reinterpret_cast<const Pack<T, n>*>(address);
}

template <int n>
__device__ void set_zero(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = 0;
}

// Where a walk over tokens is: in which sequence, and from where to where that goes.
struct Place {
  int sequence, begin, end;

  __device__ Place(const Sequences& s, int64_t b, int token) {
    if (s.cu_seqlens == nullptr) {
      sequence = static_cast<int>(b), begin = 0, end = s.T;
    } else {
      sequence = s.index_of(token);
      begin = s.cu_seqlens[sequence], end = s.cu_seqlens[sequence + 1];
    }
  }
  // On to the sequence of `token`, which is the first behind this one; empty ones are passed over.
  __device__ void advance(const Sequences& s, int token) {
    begin = token;
    do end = s.cu_seqlens[++sequence + 1];
    while (end == token);
  }
};

template <typename T>
struct Forward {
  Shape s;
  Rows<const T> in;
  Rows<T> out;
  float* state;  // (rows, W-1, C), or null
  const int32_t* state_rows;
  int64_t tiles;     // of kTokens, in a row of the batch
  bool keeps_state;  // no other thread has tokens of the same sequence
};

template <int kW, int n, typename T>
__global__ void __launch_bounds__(kThreads) forward(Forward<T> a) {
  const Shape& s = a.s;
  const int64_t tile = row_of_thread(), column = column_of_thread<n>(), c = column - s.first;
  let_next_kernel_start();
  const bool convolved = 0 <= c && c < s.C;
  const Taps<kW, n> taps(s, convolved ? c : 0);
  wait_for_earlier_kernels();
  if (tile >= s.B * a.tiles || column >= s.X) return;
  const int64_t b = tile / a.tiles;
  const int t0 = static_cast<int>(tile % a.tiles) * kTokens, t1 = min(t0 + kTokens, s.sequences.T);
  const T* const in = a.in.data + b * a.in.batch + column;
  T* const out = a.out.data + b * a.out.batch + column;

  if (!convolved) {
#pragma unroll 4
    for (int t = t0; t < t1; ++t) {
      pack_at<n>(out + t * a.out.time) = pack_at<n>(in + t * a.in.time);
    }
    return;
  }

  const auto kept = [&](int sequence) {  // the rows of its state
    return a.state + static_cast<int64_t>(a.state_rows[sequence]) * (kW - 1) * s.C + c;
  };
  Place place(s.sequences, b, t0);
  float before[kW - 1][n];
#pragma unroll
  for (int j = 0; j < kW - 1; ++j) {
    const int t = t0 - (kW - 1) + j;
    if (t >= place.begin) {
      load(in + t * a.in.time, before[j]);
    } else if (a.state != nullptr) {
      load(kept(place.sequence) + (kW - 1 + t - place.begin) * s.C, before[j]);
    } else {
      set_zero(before[j]);
    }
  }
  for (int t = t0; t < t1; t += kAhead) {
    Pack<T, n> next[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i < t1) next[i] = pack_at<n>(in + (t + i) * a.in.time);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i >= t1) break;
      if (t + i == place.end) {
        place.advance(s.sequences, t + i);
        const float* const rows = a.state == nullptr ? nullptr : kept(place.sequence);
#pragma unroll
        for (int j = 0; j < kW - 1; ++j) {
          set_zero(before[j]);
          if (rows != nullptr) load(rows + j * s.C, before[j]);
        }
      }
      float x[n], y[n];
      load(next[i].at, x);
      taps.sum(before, x, y);
      push(before, x);
#pragma unroll
      for (int k = 0; k < n; ++k) y[k] *= fast_sigmoid(y[k]);
      store(y, out + (t + i) * a.out.time);
    }
  }
  if (!a.keeps_state) return;
  float* const rows = kept(place.sequence);
#pragma unroll
  for (int j = 0; j < kW - 1; ++j) store(before[j], rows + j * s.C);
}

// The inputs of the last W-1 tokens become the state; those of a short sequence come behind what it
// has.
template <typename T>
__global__ void keep_state(Forward<T> a, int W, int64_t sequences) {
  const int64_t sequence = row_of_thread(), c = column_of_thread<1>();
  if (sequence >= sequences || c >= a.s.C) return;
  const int32_t* const cu = a.s.sequences.cu_seqlens;
  const int begin = cu == nullptr ? 0 : cu[sequence];
  const int length = cu == nullptr ? a.s.sequences.T : cu[sequence + 1] - begin;
  if (length == 0) return;
  const int64_t b = cu == nullptr ? sequence : 0;
  const T* const in = a.in.data + b * a.in.batch + a.s.first + c;
  float* const rows = a.state + static_cast<int64_t>(a.state_rows[sequence]) * (W - 1) * a.s.C + c;
  for (int k = 0; k < W - 1; ++k) {
    const int t = length - (W - 1) + k;
    rows[k * a.s.C] = t < 0 ? rows[(k + length) * a.s.C] : to_float(in[(begin + t) * a.in.time]);
  }
}

template <typename T>
struct Backward {
  Shape s;
  Rows<const T> in, d_out;
  Rows<T> d_in;
  float* d_weight;  // (blocks, C, W)
  float* d_bias;    // (blocks, C), or null
  int64_t tiles;    // of kTokensBackward, in a row of the batch
};

template <int kW, int n, typename T>
__device__ void walk_back(const Backward<T>& a, int64_t tile, int64_t column,
                          float (&d_weight)[kW][n], float (&d_bias)[n]) {
  const Shape& s = a.s;
  const int64_t b = tile / a.tiles;
  const int T_all = s.sequences.T;
  const int t0 = static_cast<int>(tile % a.tiles) * kTokensBackward;
  const int t1 = min(t0 + kTokensBackward, T_all);
  const T* const in = a.in.data + b * a.in.batch + column;
  const T* const d_out = a.d_out.data + b * a.d_out.batch + column;
  T* const d_in = a.d_in.data + b * a.d_in.batch + column;
  if (column < s.first || column >= s.first + s.C) {
#pragma unroll 4
    for (int t = t0; t < t1; ++t) {
      pack_at<n>(d_in + t * a.d_in.time) = pack_at<n>(d_out + t * a.d_out.time);
    }
    return;
  }

  const Taps<kW, n> taps(s, column - s.first);
  Place place(s.sequences, b, t0);
  float before[kW - 1][n], d_x[kW][n];  // of the last W tokens, oldest first
#pragma unroll
  for (int j = 0; j < kW - 1; ++j) {
    const int t = t0 - (kW - 1) + j;
    set_zero(before[j]);
    if (t >= place.begin) load(in + t * a.in.time, before[j]);
  }
#pragma unroll
  for (int j = 0; j < kW; ++j) set_zero(d_x[j]);

  for (int t = t0; t < t1 + kW - 1; t += kAhead) {
    Pack<T, n> next[kAhead], next_d[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (t + i >= min(t1 + kW - 1, T_all)) break;
      next[i] = pack_at<n>(in + (t + i) * a.in.time);
      next_d[i] = pack_at<n>(d_out + (t + i) * a.d_out.time);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int now = t + i;
      if (now >= t1 + kW - 1) break;
      const float zero[n] = {};
      push(d_x, zero);
      if (now < T_all) {
        if (now == place.end) {
          place.advance(s.sequences, now);
#pragma unroll
          for (int j = 0; j < kW - 1; ++j) set_zero(before[j]);
        }
        float x[n], d[n], sum[n];
        load(next[i].at, x);
        load(next_d[i].at, d);
        taps.sum(before, x, sum);
#pragma unroll
        for (int k = 0; k < n; ++k) {
          const float sigmoid = fast_sigmoid(sum[k]);
          d[k] *= sigmoid * (1 + sum[k] * (1 - sigmoid));
        }
        // Tap j reads the input of W-1-j tokens before, if that is of the same sequence.
        const int position = now - place.begin;
#pragma unroll
        for (int j = 0; j < kW; ++j) {
          if (kW - 1 - j > position) continue;
#pragma unroll
          for (int k = 0; k < n; ++k) d_x[j][k] += taps.weight[j][k] * d[k];
        }
        if (now < t1) {
#pragma unroll
          for (int k = 0; k < n; ++k) {
#pragma unroll
            for (int j = 0; j < kW - 1; ++j) d_weight[j][k] += d[k] * before[j][k];
            d_weight[kW - 1][k] += d[k] * x[k];
            d_bias[k] += d[k];
          }
        }
        push(before, x);
      }
      if (now - (kW - 1) >= t0) store(d_x[0], d_in + (now - (kW - 1)) * a.d_in.time);
    }
  }
}

template <int kW, int n, typename T>
__global__ void __launch_bounds__(kThreads, kW <= kWidthOfThreeBlocks ? 3 : 1)
    backward(Backward<T> a) {
  __shared__ float parts[kTilesOfBlock][kWarp * n];
  const Shape& s = a.s;
  const int64_t tile = row_of_thread(), column = column_of_thread<n>();
  float d_weight[kW][n] = {}, d_bias[n] = {};
  if (tile < s.B * a.tiles && column < s.X) walk_back(a, tile, column, d_weight, d_bias);

  // The block's sums for one tap after the other, then for the bias; a thread has a channel.
  const int mine = static_cast<int>(threadIdx.y * kWarp + threadIdx.x);
  const int64_t c = static_cast<int64_t>(blockIdx.y) * kWarp * n + mine - s.first;
#pragma unroll
  for (int j = 0; j <= kW; ++j) {
    __syncthreads();  // the sums before have been read
#pragma unroll
    for (int k = 0; k < n; ++k) {
      parts[threadIdx.y][threadIdx.x * n + k] = j < kW ? d_weight[j < kW ? j : 0][k] : d_bias[k];
    }
    __syncthreads();
    if (mine >= kWarp * n || c < 0 || c >= s.C) continue;
    float sum = 0;
    for (int i = 0; i < kTilesOfBlock; ++i) sum += parts[i][mine];
    if (j < kW) {
      a.d_weight[(blockIdx.x * s.C + c) * kW + j] = sum;
    } else if (a.d_bias != nullptr) {
      a.d_bias[blockIdx.x * s.C + c] = sum;
    }
  }
}

// Calls body.template operator()<W>().
template <typename Body>
void visit_width(int64_t W, Body&& body) {
  static_assert(kNarrowestConv == 2 && kWidestConv == 8);
  switch (W) {
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
    default:
      return body.template operator()<8>();
  }
}

// The columns that a pack has to divide: it lies in the channels, or outside.
int64_t width_of_packs(const Shape& s) {
  return std::gcd(std::gcd(s.first, s.C), s.X);
}

// For visit_packs(): the rows of a token in the batch, and of a batch row in time.
View in_time(const View& view) {
  return view.select(0, 0);
}
View in_batch(const View& view) {
  return view.select(1, 0);
}
View flat(const View& view) {
  return view.empty() ? view : view.reshape({view.size()});
}

}  // namespace

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const int64_t B = args.in.dim(0), T = args.in.dim(1), W = args.weight.dim(1);
  if (B == 0 || T == 0) return;
  const Shape shape = shape_of(args);
  const int64_t tiles = (T + kTokens - 1) / kTokens;
  const bool has_state = !args.state.empty();
  const bool alone = args.cu_seqlens.empty() && tiles == 1;
  visit_activation(args.in.dtype, [&]<typename Act>() {
    const Forward<Act> forward_args{.s = shape,
                                    .in = rows_of<const Act>(args.in),
                                    .out = rows_of<Act>(args.out),
                                    .state = data<float>(args.state.inputs),
                                    .state_rows = data<int32_t>(args.state.rows),
                                    .tiles = tiles,
                                    .keeps_state = has_state && alone};
    visit_packs<kPack>(width_of_packs(shape),
                       {in_time(args.in), in_batch(args.in), in_time(args.out), in_batch(args.out),
                        flat(args.weight), args.bias, flat(args.state.inputs)},
                       [&]<int n>() {
                         visit_width(W, [&]<int kW>() {
                           launch_overlapping(ctx, "short_conv", forward<kW, n, Act>,
                                              grid_of_elements(B * tiles, shape.X, n), 1,
                                              forward_args);
                         });
                       });
    if (!has_state || alone) return;
    const int64_t sequences = args.state.rows.dim(0);
    launch(ctx, "short_conv", keep_state<Act>, grid_of_elements(sequences, shape.C, 1),
           forward_args, static_cast<int>(W), sequences);
  });
}

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  const int64_t B = args.in.dim(0), T = args.in.dim(1), W = args.weight.dim(1);
  if (B == 0 || T == 0) return;
  const Shape shape = shape_of(args);
  const int64_t tiles = (T + kTokensBackward - 1) / kTokensBackward;
  const unsigned blocks = blocks_for(B * tiles, kTilesOfBlock);
  ScratchScope scope(ctx.scratch);
  float* const d_weight = scope.take<float>(blocks * shape.C * W).data();
  float* const d_bias = args.d_bias.empty() ? nullptr : scope.take<float>(blocks * shape.C).data();
  visit_activation(args.in.dtype, [&]<typename Act>() {
    const Backward<Act> backward_args{.s = shape,
                                      .in = rows_of<const Act>(args.in),
                                      .d_out = rows_of<const Act>(args.d_out),
                                      .d_in = rows_of<Act>(args.d_in),
                                      .d_weight = d_weight,
                                      .d_bias = d_bias,
                                      .tiles = tiles};
    visit_packs<kPackBackward>(
        width_of_packs(shape),
        {in_time(args.in), in_batch(args.in), in_time(args.d_out), in_batch(args.d_out),
         in_time(args.d_in), in_batch(args.d_in), flat(args.weight), args.bias},
        [&]<int n>() {
          visit_width(W, [&]<int kW>() {
            launch(ctx, "short_conv_backward", backward<kW, n, Act>,
                   {.blocks = {blocks, blocks_for(shape.X, kWarp * n)},
                    .threads = {kWarp, kTilesOfBlock}},
                   backward_args);
          });
        });
  });
  add_rows_to(ctx, "short_conv_backward", d_weight, blocks, shape.C * W,
              data<float>(args.d_weight));
  if (d_bias != nullptr) {
    add_rows_to(ctx, "short_conv_backward", d_bias, blocks, shape.C, data<float>(args.d_bias));
  }
}

}  // namespace mamba3::cuda
