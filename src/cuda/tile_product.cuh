#pragma once

// Products of small f32 matrices in global memory, a 64 x 64 tile a block of 128 threads, for
// kernels that compute many of them at once. Arithmetic is f32 on the CUDA cores.

#include "cuda/device.cuh"

namespace mamba3::cuda {

inline constexpr int kTile = 64;  // rows and columns
inline constexpr int kTileThreads = 128;
inline constexpr int kTileInner = 16;  // terms of a step

// An operand of A B: element (row, column) at data[row * stride + column], its transpose if
// kTransposed. `scale`, if any, multiplies by inner index.
template <bool kTransposed>
struct TileOperand {
  const float* data;
  int stride;
  const float* scale = nullptr;
};
template <bool kTransposed = false>
__device__ TileOperand<kTransposed> operand(const float* data, int stride,
                                            const float* scale = nullptr) {
  return {data, stride, scale};
}

// The tile of a thread block: a thread has the rows row(0..7) and the columns col .. col + 3.
struct Tile {
  static constexpr int kRows = 8, kCols = 4;

  int row0, rows;  // the tile's first row, and those of the matrix
  int col0, cols;
  float sum[kRows][kCols] = {};

  struct Shared {
    // Transposed: [inner][row or column]. The padding keeps 16-byte alignment.
    float a[kTileInner][kTile + 4];
    float b[kTileInner][kTile + 4];
  };

  __device__ Tile(int row_tile, int all_rows, int col_tile, int all_cols)
      : row0(row_tile * kTile), rows(all_rows), col0(col_tile * kTile), cols(all_cols) {}

  __device__ int row(int i) const {
    return row0 + static_cast<int>(threadIdx.x) / (kTile / kCols) * kRows + i;
  }
  __device__ int col() const {
    return col0 + static_cast<int>(threadIdx.x) % (kTile / kCols) * kCols;
  }

  // sum += A B over the inner indices [begin, end). All threads of the block call it together.
  template <bool kTransA, bool kTransB>
  __device__ void multiply(Shared& shared, const TileOperand<kTransA>& a,
                           const TileOperand<kTransB>& b, int begin, int end) {
    // A is contiguous along the inner index unless transposed, B if it is.
    Piece<!kTransA> next_a(a.data, a.stride, a.scale, row0, rows, begin, end);
    Piece<kTransB> next_b(b.data, b.stride, b.scale, col0, cols, begin, end);
    if (begin < end) next_a.load(begin), next_b.load(begin);
    for (int k = begin; k < end; k += kTileInner) {
      __syncthreads();  // the last step's tiles have been used
      next_a.store(shared.a);
      next_b.store(shared.b);
      __syncthreads();
      if (k + kTileInner < end) next_a.load(k + kTileInner), next_b.load(k + kTileInner);
      const int my_row = row(0) - row0, my_col = col() - col0;
#pragma unroll
      for (int inner = 0; inner < kTileInner; ++inner) {
        const float4 low = *reinterpret_cast<const float4*>(&shared.a[inner][my_row]);
        const float4 high = *reinterpret_cast<const float4*>(&shared.a[inner][my_row + 4]);
        const float4 right = *reinterpret_cast<const float4*>(&shared.b[inner][my_col]);
        const float left[kRows] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          sum[i][0] = fmaf(left[i], right.x, sum[i][0]);
          sum[i][1] = fmaf(left[i], right.y, sum[i][1]);
          sum[i][2] = fmaf(left[i], right.z, sum[i][2]);
          sum[i][3] = fmaf(left[i], right.w, sum[i][3]);
        }
      }
    }
  }

  // Writes row i of the thread's part; rows of `out` are `stride` elements apart, or without gaps.
  __device__ void store(float* out, int i, const float (&values)[kCols], int stride) const {
    if (row(i) >= rows) return;
    float* at = out + static_cast<int64_t>(row(i)) * stride + col();
    if (cols % 4 == 0 && stride % 4 == 0) {
      if (col() < cols) {
        *reinterpret_cast<float4*>(at) = make_float4(values[0], values[1], values[2], values[3]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        if (col() + j < cols) at[j] = values[j];
      }
    }
  }
  __device__ void store(float* out, int i, const float (&values)[kCols]) const {
    store(out, i, values, cols);
  }

 private:
  // What a thread carries of the next step of one operand, whose elements are (outer, inner):
  // outer is its row for A and its column for B.
  template <bool kInnerFast>
  struct Piece {
    static constexpr int kCount = kTile * kTileInner / kTileThreads;  // 8: two vectors

    const float* data;
    int stride;
    const float* scale;
    int outer0, outer_end, inner_end;
    bool vectors;  // four neighbours are all inside or all outside, and aligned
    float values[kCount];

    __device__ Piece(const float* from, int row_stride, const float* scale_by_inner, int first,
                     int end, int inner_begin, int inner_limit)
        : data(from),
          stride(row_stride),
          scale(scale_by_inner),
          outer0(first),
          outer_end(end),
          inner_end(inner_limit),
          vectors(row_stride % 4 == 0 &&
                  (kInnerFast ? (inner_begin | inner_limit) % 4 == 0 : end % 4 == 0)) {}

    // Position u of the thread's elements, the vectors' fourth elements included.
    __device__ static int outer_of(int u, bool vectors) {
      const int thread = static_cast<int>(threadIdx.x);
      if (kInnerFast) return vectors ? thread / 4 + u / 4 * 32 : thread / 16 + 8 * u;
      return vectors ? thread % 16 * 4 + u % 4 : thread % 64;
    }
    __device__ static int inner_of(int u, bool vectors) {
      const int thread = static_cast<int>(threadIdx.x);
      if (kInnerFast) return vectors ? thread % 4 * 4 + u % 4 : thread % 16;
      return vectors ? thread / 16 + u / 4 * 8 : thread / 64 + 2 * u;
    }

    __device__ void load(int inner0) {
      if (vectors) {
#pragma unroll
        for (int u = 0; u < kCount; u += 4) {
          const int outer = outer0 + outer_of(u, true), inner = inner0 + inner_of(u, true);
          float4 four = make_float4(0, 0, 0, 0);
          if (outer < outer_end && inner < inner_end) {
            const int64_t at = kInnerFast ? static_cast<int64_t>(outer) * stride + inner
                                          : static_cast<int64_t>(inner) * stride + outer;
            four = *reinterpret_cast<const float4*>(data + at);
          }
          values[u] = four.x, values[u + 1] = four.y;
          values[u + 2] = four.z, values[u + 3] = four.w;
        }
      } else {
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const int outer = outer0 + outer_of(u, false), inner = inner0 + inner_of(u, false);
          const int64_t at = kInnerFast ? static_cast<int64_t>(outer) * stride + inner
                                        : static_cast<int64_t>(inner) * stride + outer;
          values[u] = outer < outer_end && inner < inner_end ? data[at] : 0.0f;
        }
      }
      if (scale) {
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          const int inner = inner0 + inner_of(u, vectors);
          if (inner < inner_end) values[u] *= scale[inner];
        }
      }
    }

    __device__ void store(float (&shared)[kTileInner][kTile + 4]) const {
      if (!kInnerFast && vectors) {
#pragma unroll
        for (int u = 0; u < kCount; u += 4) {
          *reinterpret_cast<float4*>(&shared[inner_of(u, true)][outer_of(u, true)]) =
              make_float4(values[u], values[u + 1], values[u + 2], values[u + 3]);
        }
      } else {
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
          shared[inner_of(u, vectors)][outer_of(u, vectors)] = values[u];
        }
      }
    }
  };
};

inline unsigned tiles_of(int64_t n) {
  return blocks_for(n, kTile);
}

}  // namespace mamba3::cuda
