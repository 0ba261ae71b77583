#include "cuda/overlap.cuh"
#include "cuda/pack.cuh"
#include "ops/swiglu.h"

namespace mamba3::cuda {

namespace {

constexpr int kPack = 4;

template <int n, typename T>
__global__ void forward(const T* y_gate, int64_t y_stride, T* out, int64_t out_stride, int64_t M,
                        int64_t F) {
  const int64_t m = row_of_thread(), i = column_of_thread<n>();
  let_next_kernel_start();
  wait_for_earlier_kernels();
  if (m >= M || i >= F) return;
  float y[n], gate[n];
  load(y_gate + m * y_stride + i, y);
  load(y_gate + m * y_stride + F + i, gate);
#pragma unroll
  for (int j = 0; j < n; ++j) y[j] *= silu(gate[j]);
  store(y, out + m * out_stride + i);
}

// d_y = d_out silu(gate);  d_gate = d_out y silu'(gate) with silu'(g) = s (1 + g (1 - s)), s =
// sigmoid(g). d_y_gate may be y_gate: a thread writes only where it has read.
template <int n, typename T>
__global__ void backward(const T* y_gate, int64_t y_stride, const T* d_out, int64_t d_out_stride,
                         T* d_y_gate, int64_t d_y_stride, int64_t M, int64_t F) {
  const int64_t m = row_of_thread(), i = column_of_thread<n>();
  if (m >= M || i >= F) return;
  float y[n], gate[n], d[n];
  load(y_gate + m * y_stride + i, y);
  load(y_gate + m * y_stride + F + i, gate);
  load(d_out + m * d_out_stride + i, d);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float g = gate[j], s = sigmoid(g);
    gate[j] = d[j] * y[j] * (s * (1 + g * (1 - s)));
    y[j] = d[j] * (g * s);
  }
  store(y, d_y_gate + m * d_y_stride + i);
  store(gate, d_y_gate + m * d_y_stride + F + i);
}

}  // namespace

void swiglu(Context& ctx, const SwigluArgs& args) {
  const int64_t M = args.out.dim(0), F = args.out.dim(1);
  visit_activation(args.out.dtype, [&]<typename T>() {
    visit_packs<16 / sizeof(T)>(F, {args.y_gate, args.out}, [&]<int n>() {
      launch_overlapping(ctx, "swiglu", forward<n, T>, grid_of_elements(M, F, n), 1,
                         data<T>(args.y_gate), row_stride(args.y_gate), data<T>(args.out),
                         row_stride(args.out), M, F);
    });
  });
}

void swiglu_backward(Context& ctx, const SwigluBackwardArgs& args) {
  const int64_t M = args.d_out.dim(0), F = args.d_out.dim(1);
  visit_activation(args.d_out.dtype, [&]<typename T>() {
    visit_packs<kPack>(F, {args.y_gate, args.d_out, args.d_y_gate}, [&]<int n>() {
      launch(ctx, "swiglu_backward", backward<n, T>, grid_of_elements(M, F, n),
             data<T>(args.y_gate), row_stride(args.y_gate), data<T>(args.d_out),
             row_stride(args.d_out), data<T>(args.d_y_gate), row_stride(args.d_y_gate), M, F);
    });
  });
}

}  // namespace mamba3::cuda
