#pragma once

// What the kernels of attention are made of: heads in memory, sequences, and tiles.
//
// A block of threads owns 64 rows (queries in the forward and for the gradient of q, keys for the
// gradients of k and v) and walks over the others in tiles of columns. Everything it does with them
// is one of two products, which is all that an engine has to offer:
//
//   dots        s (rows, columns) = the products of its rows with a tile's rows, over d
//   accumulate  o (rows, d) += s (rows, columns) times the tile's rows
//
// Both leave every thread with the same kMyRows rows of s and of o and with some of their columns,
// so that the softmax between the two products happens in registers; the lanes that share a row are
// neighbours. There are two engines: MatrixUnits, bf16 on the tensor cores, and PlainTiles, for f32
// and for everything else.

#include <cstdint>

#include "cuda/packed.cuh"

namespace mamba3::cuda {

inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Consecutive tokens of one head.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;  // between tokens
  int count = 0, d = 0;
  bool bf16 = false;     // else f32
  bool vectors = false;  // d and all addresses are multiples of 8 elements

  // 0 outside.
  __device__ float at(int row, int dim) const {
    if (row >= count || dim >= d) return 0.0f;
    const int64_t i = row * stride + dim;
    return bf16 ? to_float(static_cast<const __nv_bfloat16*>(data)[i])
                : static_cast<const float*>(data)[i];
  }
  // Ignored outside.
  __device__ void set(int row, int dim, float value) const {
    if (row >= count || dim >= d) return;
    const int64_t i = row * stride + dim;
    if (bf16) {
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value);
    } else {
      static_cast<float*>(data)[i] = value;
    }
  }
};

// (B, T, heads, d), the heads without gaps.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0, token_stride = 0;
  int d = 0;
  bool bf16 = false, vectors = false;

  __device__ Rows rows(int64_t b, int64_t token, int64_t head, int count) const {
    const int64_t offset = b * batch_stride + token * token_stride + head * d;
    return {
        static_cast<char*>(data) + offset * (bf16 ? 2 : 4), token_stride, count, d, bf16, vectors};
  }
};

// The heads from `first` on of a view (B, T, heads d) or (B, T, heads, d).
inline Heads heads_of(const View& view, int64_t first, int64_t d) {
  char* const begin = static_cast<char*>(view.data) + first * d * size_of(view.dtype);
  bool vectors = d % 8 == 0 && reinterpret_cast<uintptr_t>(begin) % 16 == 0;
  for (int axis = 0; axis < 2; ++axis) {
    vectors = vectors && (view.dim(axis) <= 1 || view.stride(axis) % 8 == 0);
  }
  return {begin,  view.stride(0), view.stride(1), static_cast<int>(d), view.dtype == DType::bf16,
          vectors};
}

// The sum or maximum over 2, 4, ... neighbouring lanes, in all of them.
template <int kLanes>
__device__ float lanes_sum(float value) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
  return value;
}
template <int kLanes>
__device__ float lanes_max(float value) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, lane));
  }
  return value;
}

// f32 arithmetic for rows of either dtype and d <= kD. Tiles pass through shared memory in pieces:
// of 32 dims for dots, of some rows for accumulate; the next load waits for the last product, and
// it is left to the other warps to fill the gap.
template <int kD>
class PlainTiles {
 public:
  static constexpr int kThreads = 256, kRows = 64, kColumns = 64;
  static constexpr int kMyRows = 4, kMyColumns = 4, kMyDims = kD / 16;
  static constexpr int kRowLanes = 16;

  using Resident = Rows;  // stays in global memory

  static constexpr size_t shared_bytes() { return (kStage + kColumns * kPitch) * sizeof(float); }

  __device__ explicit PlainTiles(void* shared)
      : stage_(static_cast<float*>(shared)), weights_(stage_ + kStage) {}

  __device__ int row(int i) const { return y() * 4 + i; }
  __device__ int column(int i) const { return x() * 4 + i; }
  __device__ int dim(int i) const { return i / 4 * 64 + x() * 4 + i % 4; }

  __device__ void load(Resident& resident, const Rows& rows) { resident = rows; }
  __device__ void fetch(int, const Rows&) {}
  __device__ void wait() {}

  __device__ __forceinline__ void dots(const Resident& mine, int, const Rows& tile,
                                       float (&s)[kMyRows][kMyColumns]) {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) s[i][j] = 0.0f;
    }
    float *const a = stage_, *const b = stage_ + kDims * kPitch;  // (dim, row)
    for (int first = 0; first < tile.d; first += kDims) {
      __syncthreads();  // the stage is free
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kDims; i += kThreads) {
        a[i % kDims * kPitch + i / kDims] = mine.at(i / kDims, first + i % kDims);
        b[i % kDims * kPitch + i / kDims] = tile.at(i / kDims, first + i % kDims);
      }
      __syncthreads();
#pragma unroll 8
      for (int c = 0; c < kDims; ++c) {
        const float4 a4 = four(a + c * kPitch + y() * 4), b4 = four(b + c * kPitch + x() * 4);
        const float rows[4] = {a4.x, a4.y, a4.z, a4.w}, columns[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
        for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
          for (int j = 0; j < kMyColumns; ++j) s[i][j] = fmaf(rows[i], columns[j], s[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&s)[kMyRows][kMyColumns], int,
                                             const Rows& tile, float (&o)[kMyRows][kMyDims]) {
    __syncthreads();  // the weights of an earlier call are read
#pragma unroll
    for (int j = 0; j < kMyColumns; ++j) {
      *reinterpret_cast<float4*>(weights_ + column(j) * kPitch + y() * 4) = {s[0][j], s[1][j],
                                                                             s[2][j], s[3][j]};
    }
    for (int first = 0; first < tile.count; first += kStageRows) {
      __syncthreads();  // the stage is free; the first time, also: the weights are there
      for (int i = static_cast<int>(threadIdx.x); i < kStageRows * kD; i += kThreads) {
        stage_[i] = tile.at(first + i / kD, i % kD);
      }
      __syncthreads();
#pragma unroll 4
      for (int j = 0; j < kStageRows; ++j) {
        const float4 w4 = four(weights_ + (first + j) * kPitch + y() * 4);
        const float w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
        for (int c = 0; c < kMyDims; c += 4) {
          const float4 b4 = four(stage_ + j * kD + dim(c));
          const float b[4] = {b4.x, b4.y, b4.z, b4.w};
#pragma unroll
          for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) o[i][c + e] = fmaf(w[i], b[e], o[i][c + e]);
          }
        }
      }
    }
  }

  __device__ void store(const Rows& out, const float (&o)[kMyRows][kMyDims]) const {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int c = 0; c < kMyDims; ++c) out.set(row(i), dim(c), o[i][c]);
    }
  }

 private:
  static constexpr int kPitch = 68;  // of 64 values: keeps float4 aligned, spreads the banks
  static constexpr int kDims = 32;
  static constexpr int kStageRows = 4096 / kD;  // divides kColumns
  static constexpr int kStage = 2 * kDims * kPitch;
  static_assert(kStage >= kStageRows * kD && kColumns % kStageRows == 0);

  __device__ static int x() {
    return static_cast<int>(threadIdx.x) % 16;
  }
  __device__ static int y() {
    return static_cast<int>(threadIdx.x) / 16;
  }
  __device__ static float4 four(const float* at) {
    return *reinterpret_cast<const float4*>(at);
  }

  float *stage_, *weights_;
};

// bf16 rows with d <= kD (the rest is filled with zeros) on the tensor cores: every one of four
// warps owns 16 rows, whose values stay in registers in the layout of the instruction's left
// factor. Tiles are copied asynchronously to one of kSlots slots of shared memory, in rows of kD +
// 8, so that the eight rows that ldmatrix reads at a time lie in different banks. Its instruction
// is mma.m16n8k16: with g = lane / 4 and t = lane % 4, a thread holds
//   of the left factor (16, 16)   rows g, g+8; columns 2t, 2t+1, 2t+8, 2t+9
//   of the right one (16, 8)      rows 2t, 2t+1, 2t+8, 2t+9; column g
//   of the product (16, 8)        rows g, g+8; columns 2t, 2t+1
// so that the products s, rounded to bf16, are the left factor of accumulate as they are.
template <int kD, int kColumns_, int kSlots>
class MatrixUnits {
 public:
  static constexpr int kThreads = 128, kRows = 64, kColumns = kColumns_;
  static constexpr int kMyRows = 2, kMyColumns = kColumns / 4, kMyDims = kD / 4;
  static constexpr int kRowLanes = 4;
  static_assert(kColumns % 16 == 0 && kD % 16 == 0);

  struct Resident {
    uint32_t factor[kD / 16][4];
  };

  static constexpr size_t shared_bytes() {
    const int tiles = kSlots * kColumns;
    return static_cast<size_t>(tiles > kRows ? tiles : kRows) * kPitch * sizeof(__nv_bfloat16);
  }

  __device__ explicit MatrixUnits(void* shared) : tiles_(static_cast<__nv_bfloat16*>(shared)) {}

  __device__ int row(int i) const { return warp() * 16 + lane() / 4 + i * 8; }
  __device__ int column(int i) const { return i / 2 * 8 + lane() % 4 * 2 + i % 2; }

  // Overwrites the slots.
  __device__ __forceinline__ void load(Resident& resident, const Rows& rows) {
    __syncthreads();
    copy<kRows>(tiles_, rows);
    wait();
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
      // The quarters (rows 0, dims 0), (8, 0), (0, 8), (8, 8).
      load_matrices<false>(
          resident.factor[k],
          shared_address(tiles_ + (warp() * 16 + lane() % 16) * kPitch + k * 16 + lane() / 16 * 8));
    }
    __syncthreads();
  }

  // Begins to load a tile. All use of the slot must be followed by a wait() before.
  __device__ __forceinline__ void fetch(int slot, const Rows& tile) {
    copy<kColumns>(tiles_ + slot * kColumns * kPitch, tile);
  }
  // Everything that was begun is there, for all threads.
  __device__ void wait() {
    wait_all_copies();
    __syncthreads();
  }

  __device__ __forceinline__ void dots(const Resident& mine, int slot, const Rows&,
                                       float (&s)[kMyRows][kMyColumns]) {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int j = 0; j < kMyColumns; ++j) s[i][j] = 0.0f;
    }
    // The right factor is the tile transposed. Of 16 of its rows and 16 dims:
    // the quarters (rows 0, dims 0), (0, 8), (8, 0), (8, 8).
    const __nv_bfloat16* const tile = tiles_ + slot * kColumns * kPitch +
                                      (lane() % 8 + lane() / 16 * 8) * kPitch + lane() / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kD / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t right[4];
        load_matrices<false>(right, shared_address(tile + n * 16 * kPitch + k * 16));
        multiply(s, n * 4, mine.factor[k], right[0], right[1]);
        multiply(s, n * 4 + 2, mine.factor[k], right[2], right[3]);
      }
    }
  }

  __device__ __forceinline__ void accumulate(const float (&s)[kMyRows][kMyColumns], int slot,
                                             const Rows&, float (&o)[kMyRows][kMyDims]) {
    // The quarters (rows 0, dims 0), (8, 0), (0, 8), (8, 8), each transposed.
    const __nv_bfloat16* const tile =
        tiles_ + slot * kColumns * kPitch + lane() % 16 * kPitch + lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      const uint32_t left[4] = {
          pack_bf16(s[0][k * 4], s[0][k * 4 + 1]), pack_bf16(s[1][k * 4], s[1][k * 4 + 1]),
          pack_bf16(s[0][k * 4 + 2], s[0][k * 4 + 3]), pack_bf16(s[1][k * 4 + 2], s[1][k * 4 + 3])};
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t right[4];
        load_matrices<true>(right, shared_address(tile + k * 16 * kPitch + n * 16));
        multiply(o, n * 4, left, right[0], right[1]);
        multiply(o, n * 4 + 2, left, right[2], right[3]);
      }
    }
  }

  __device__ __forceinline__ void store(const Rows& out, const float (&o)[kMyRows][kMyDims]) const {
#pragma unroll
    for (int i = 0; i < kMyRows; ++i) {
#pragma unroll
      for (int c = 0; c < kMyDims; c += 2) {
        if (!out.vectors) {
          out.set(row(i), column(c), o[i][c]);
          out.set(row(i), column(c + 1), o[i][c + 1]);
        } else if (row(i) < out.count && column(c) < out.d) {
          *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(out.data) + row(i) * out.stride +
                                       column(c)) = pack_bf16(o[i][c], o[i][c + 1]);
        }
      }
    }
  }

 private:
  static constexpr int kPitch = kD + 8;

  __device__ static int lane() {
    return static_cast<int>(threadIdx.x) % kWarp;
  }
  __device__ static int warp() {
    return static_cast<int>(threadIdx.x) / kWarp;
  }

  // kCount rows to shared memory, zeros where there is nothing.
  template <int kCount>
  __device__ static __forceinline__ void copy(__nv_bfloat16* to, const Rows& rows) {
    const auto* const from = static_cast<const __nv_bfloat16*>(rows.data);
    for (int i = static_cast<int>(threadIdx.x); i < kCount * (kD / 8); i += kThreads) {
      const int row = i / (kD / 8), dim = i % (kD / 8) * 8;
      __nv_bfloat16* const at = to + row * kPitch + dim;
      if (rows.vectors) {
        const bool inside = row < rows.count && dim < rows.d;
        copy_async(shared_address(at), inside ? from + row * rows.stride + dim : from,
                   inside ? 16 : 0);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const bool inside = row < rows.count && dim + e < rows.d;
          at[e] = inside ? from[row * rows.stride + dim + e] : from_float<__nv_bfloat16>(0.0f);
        }
      }
    }
  }

  // Columns c, c+1 of the thread, which belong to one product of 16 x 8.
  template <int kWidth>
  __device__ static void multiply(float (&s)[kMyRows][kWidth], int c, const uint32_t (&left)[4],
                                  uint32_t right0, uint32_t right1) {
    multiply_add(s[0][c], s[0][c + 1], s[1][c], s[1][c + 1], left, right0, right1);
  }

  __nv_bfloat16* tiles_;
};

}  // namespace mamba3::cuda
