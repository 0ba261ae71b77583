#pragma once

// What the scans that walk a sequence share: loads ahead of their use, and products of matrices
// that a block has at hand. These are cut into tiles of 4 x 4 elements, which threads take in turn:
// 64 multiplications for 8 loads of 16 bytes. All sizes are multiples of 4, and rows lie at
// multiples of 16 bytes; where these are odd, threads that read neighbouring rows meet no other in
// its bank.

#include "cuda/device.cuh"

namespace mamba3::cuda {

// 4 x 4 elements of a product: rows row0 + i row_step, columns col0 + j col_step.
struct WalkTile {
  static constexpr int kSize = 4;
  int row0, col0, row_step, col_step;
  float sum[kSize][kSize] = {};

  __device__ WalkTile(int row, int col, int rows_apart, int cols_apart)
      : row0(row), col0(col), row_step(rows_apart), col_step(cols_apart) {}
  __device__ int row(int i) const { return row0 + i * row_step; }
  __device__ int col(int j) const { return col0 + j * col_step; }

  // += A B^T for A (rows, inner), B (columns, inner).
  __device__ void add_dots(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row0 * lda;
    b += col0 * ldb;
    const int a_step = row_step * lda, b_step = col_step * ldb;
#pragma unroll 2
    for (int k = 0; k < inner; k += 4) {
      float4 a_k[kSize], b_k[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) a_k[i] = four(a + i * a_step + k);
#pragma unroll
      for (int j = 0; j < kSize; ++j) b_k[j] = four(b + j * b_step + k);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          float& s = sum[i][j];
          s = fmaf(a_k[i].x, b_k[j].x, s);
          s = fmaf(a_k[i].y, b_k[j].y, s);
          s = fmaf(a_k[i].z, b_k[j].z, s);
          s = fmaf(a_k[i].w, b_k[j].w, s);
        }
      }
    }
  }
  // += A B for A (rows, inner), B (inner, columns); both steps are 1, as they are below.
  __device__ void add(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row0 * lda;
    b += col0;
#pragma unroll 2
    for (int k = 0; k < inner; k += 4) {
      float4 a_k[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) a_k[i] = four(a + i * lda + k);
      add_outer({a_k[0].x, a_k[1].x, a_k[2].x, a_k[3].x}, four(b + k * ldb));
      add_outer({a_k[0].y, a_k[1].y, a_k[2].y, a_k[3].y}, four(b + (k + 1) * ldb));
      add_outer({a_k[0].z, a_k[1].z, a_k[2].z, a_k[3].z}, four(b + (k + 2) * ldb));
      add_outer({a_k[0].w, a_k[1].w, a_k[2].w, a_k[3].w}, four(b + (k + 3) * ldb));
    }
  }
  // += A^T B for A (inner, rows), B (inner, columns).
  __device__ void add_transposed(const float* a, int lda, const float* b, int ldb, int inner) {
    a += row0;
    b += col0;
#pragma unroll 8
    for (int k = 0; k < inner; ++k) add_outer(four(a + k * lda), four(b + k * ldb));
  }

  // The same with row k of A times scale[k].
  __device__ void add_transposed(const float* a, int lda, const float* scale, const float* b,
                                 int ldb, int inner) {
    a += row0;
    b += col0;
#pragma unroll 8
    for (int k = 0; k < inner; ++k) {
      const float4 a_k = four(a + k * lda);
      const float factor = scale[k];
      add_outer({factor * a_k.x, factor * a_k.y, factor * a_k.z, factor * a_k.w},
                four(b + k * ldb));
    }
  }

  // body(element, row, column) for the elements.
  template <typename Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) body(sum[i][j], row(i), col(j));
    }
  }
  // The rest is for tiles whose steps are 1.
  __device__ void store(float* matrix, int ld) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      *reinterpret_cast<float4*>(matrix + (row0 + i) * ld + col0) =
          make_float4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
    }
  }
  __device__ void scale_row(int i, float factor) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum[i][j] *= factor;
  }
  __device__ void add_scaled(float scale, const float* matrix, int ld) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const float4 m = four(matrix + (row0 + i) * ld + col0);
      sum[i][0] = fmaf(scale, m.x, sum[i][0]);
      sum[i][1] = fmaf(scale, m.y, sum[i][1]);
      sum[i][2] = fmaf(scale, m.z, sum[i][2]);
      sum[i][3] = fmaf(scale, m.w, sum[i][3]);
    }
  }

 private:
  __device__ static float4 four(const float* at) {
    return *reinterpret_cast<const float4*>(at);
  }
  __device__ void add_outer(const float4& a, const float4& b) {
    const float left[] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum[i][0] = fmaf(left[i], b.x, sum[i][0]);
      sum[i][1] = fmaf(left[i], b.y, sum[i][1]);
      sum[i][2] = fmaf(left[i], b.z, sum[i][2]);
      sum[i][3] = fmaf(left[i], b.w, sum[i][3]);
    }
  }
};

// Calls use(i, load(i)) for every kStep-th i from `first` to below `count`, with kAhead loads on
// their way at a time.
template <int kStep, int kAhead = 4, typename Load, typename Use>
__device__ void load_ahead(int first, int count, const Load& load, const Use& use) {
  for (; first < count; first += kAhead * kStep) {
    decltype(load(0)) values[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * kStep < count) values[u] = load(first + u * kStep);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * kStep < count) use(first + u * kStep, values[u]);
    }
  }
}

// The tiles of the products of one phase, which the threads of a block take in turn.
template <int kThreads>
class WalkTurn {
 public:
  // Calls body(tile) for this thread's tiles of a product (rows, columns), whose elements are
  // neighbours: for add() and add_transposed().
  template <typename Body>
  __device__ void tiles(int rows, int columns, const Body& body) {
    const int across = columns / WalkTile::kSize;
    each(rows / WalkTile::kSize * across, [&](int i) {
      WalkTile tile(i / across * WalkTile::kSize, i % across * WalkTile::kSize, 1, 1);
      body(tile);
    });
  }
  // The same with elements far apart, so that the threads of a warp have neighbours: for
  // add_dots(), where they read other rows of the same columns.
  template <typename Body>
  __device__ void spread_tiles(int rows, int columns, const Body& body) {
    const int across = columns / WalkTile::kSize, down = rows / WalkTile::kSize;
    each(down * across, [&](int i) {
      WalkTile tile(i / across, i % across, down, across);
      body(tile);
    });
  }

 private:
  template <typename Body>
  __device__ void each(int count, const Body& body) {
    for (int i = (static_cast<int>(threadIdx.x) + kThreads - taken_) % kThreads; i < count;
         i += kThreads) {
      body(i);
    }
    taken_ = (taken_ + count) % kThreads;
  }
  int taken_ = 0;
};

}  // namespace mamba3::cuda
