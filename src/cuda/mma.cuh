#pragma once

// Products of bf16 tiles on tensor cores, by instructions that every card from compute capability
// 8.0 has: asynchronous copies into shared memory, ldmatrix, and mma.m16n8k16 with f32 sums.
//
// A warp holds operands and sums in fragments. With r = lane / 4 and c = lane % 4 a lane has
//   of A (16 x 16)  a[0]: row r, columns 2c, 2c+1    a[2]: row r, columns 2c+8, 2c+9
//                   a[1], a[3]: the same of row r+8
//   of B (16 x 8)   b[0]: rows 2c, 2c+1 of column r  b[1]: rows 2c+8, 2c+9
//   of C (16 x 8)   c[0], c[1]: row r, columns 2c, 2c+1   c[2], c[3]: row r+8
// The C of two neighbouring column tiles, rounded to bf16, is the A of a product that sums over
// those columns.

#include "cuda/device.cuh"

namespace mamba3::cuda {

using bf16 = __nv_bfloat16;

struct FragmentA {
  uint32_t at[4];
};
struct FragmentB {
  uint32_t at[2];
};
struct FragmentC {
  float at[4];
};

// c += a b
__device__ inline void mma(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  multiply_add(c.at[0], c.at[1], c.at[2], c.at[3], a.at, b.at[0], b.at[1]);
}

// Two bf16 in a register, as pack_bf16() makes it.
__device__ inline float2 unpack_bf16(uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
__device__ inline uint32_t multiply_bf16(uint32_t both, float low, float high) {
  const float2 values = unpack_bf16(both);
  return pack_bf16(values.x * low, values.y * high);
}

// Two neighbouring column tiles of C as the A of a next product.
__device__ inline FragmentA as_a(const FragmentC& left, const FragmentC& right) {
  return {{pack_bf16(left.at[0], left.at[1]), pack_bf16(left.at[2], left.at[3]),
           pack_bf16(right.at[0], right.at[1]), pack_bf16(right.at[2], right.at[3])}};
}

// A matrix of bf16 in shared memory with 64 rows and kColumns columns, 64 or a multiple, at a
// multiple of 128 bytes: panels of 64 columns, whose rows are 128 bytes. Pieces of 8 columns lie
// permuted by their row, so that 8 rows of one column of pieces are in different banks. Columns are
// given as a multiple of 8 and, where that depends on the lane, what is to be added: the first is
// then a constant that costs one instruction.
template <int kColumns>
struct SharedTile {
  static_assert(kColumns % 64 == 0);
  static constexpr int kRowBytes = 128, kPanelBytes = 64 * kRowBytes;
  struct Pair {
    FragmentB left, right;
  };
  uint32_t base;  // in bytes

  __device__ uint32_t at(int row, int column, int more = 0) const {
    return shifted(row_start(row) + static_cast<uint32_t>(more * 2), column);
  }

  __device__ uint32_t load2(int row, int column, int more) const {  // two neighbours
    return load_shared(at(row, column, more));
  }
  __device__ void store2(int row, int column, int more, uint32_t value) const {
    store_shared(at(row, column, more), value);
  }
  __device__ uint4 load8(int row, int column) const { return load_shared4(at(row, column)); }
  __device__ void store8(int row, int column, uint4 v) const { store_shared4(at(row, column), v); }

  // The 16 x 16 block at (row, column), multiples of 8 and 16, as A, or its transpose as A.
  __device__ FragmentA a(int row, int column) const {
    return load4<false>(row, column, lane() % 16, lane() / 16);
  }
  __device__ FragmentA a_transposed(int row, int column) const {
    return load4<true>(row, column, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
  }
  // Writes such a block.
  __device__ void store_a(int row, int column, const FragmentA& f) const {
    const int r = row + lane() / 4, more = lane() % 4 * 2;
    store2(r, column, more, f.at[0]);
    store2(r + 8, column, more, f.at[1]);
    store2(r, column + 8, more, f.at[2]);
    store2(r + 8, column + 8, more, f.at[3]);
  }
  // Writes the 16 x 8 block of C, rounded.
  __device__ void store_c(int row, int column, const FragmentC& f) const {
    const int r = row + lane() / 4, more = lane() % 4 * 2;
    store2(r, column, more, pack_bf16(f.at[0], f.at[1]));
    store2(r + 8, column, more, pack_bf16(f.at[2], f.at[3]));
  }
  // The block with its 16 rows as the sum's index, as two B of 8 columns each.
  __device__ Pair b(int row, int column) const {
    return pair(load4<true>(row, column, lane() % 16, lane() / 16));
  }
  // The same with its 16 columns as the sum's index: two B of 8 rows each, transposed.
  __device__ Pair b_transposed(int row, int column) const {
    return pair(load4<false>(row, column, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2));
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ static Pair pair(const FragmentA& f) {
    return {{{f.at[0], f.at[1]}}, {{f.at[2], f.at[3]}}};
  }
  __device__ uint32_t row_start(int row) const {
    return base + static_cast<uint32_t>(row * kRowBytes + (row & 7) * 16);
  }
  __device__ static uint32_t shifted(uint32_t address, int column) {
    return (address ^ static_cast<uint32_t>(column % 64 * 2)) +
           static_cast<uint32_t>(column / 64 * kPanelBytes);
  }
  // `lane_row` and `lane_piece`: of the row that this lane names, within the block.
  template <bool kTransposed>
  __device__ FragmentA load4(int row, int column, int lane_row, int lane_piece) const {
    const uint32_t address =
        shifted(row_start(lane_row) ^ static_cast<uint32_t>(lane_piece * 16), column) +
        static_cast<uint32_t>(row * kRowBytes);
    FragmentA f;
    load_matrices<kTransposed>(f.at, address);
    return f;
  }
};

// sums += A B by 4 warps with 16 of the 64 rows each, `row` being this warp's first. A has rows, or
// with kTransA columns, 0 to 63 of its tile; B has 8 kTiles columns from `first` on, or with
// !kTransB as many rows: B is stored transposed. The sum's index goes over [0, kInner); those
// outside [begin, end) are known to add nothing to this warp's rows.
template <bool kTransA, bool kTransB, int kInner, int kTiles, int kA, int kB>
__device__ void multiply(FragmentC (&sums)[kTiles], const SharedTile<kA>& a,
                         const SharedTile<kB>& b, int row, int first, int begin = 0,
                         int end = kInner) {
#pragma unroll
  for (int i = 0; i < kInner; i += 16) {
    if (i < begin || i >= end) continue;
    const FragmentA left = kTransA ? a.a_transposed(i, row) : a.a(row, i);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      const auto right = kTransB ? b.b(i, first + 8 * tile) : b.b_transposed(first + 8 * tile, i);
      mma(sums[tile], left, right.left);
      mma(sums[tile + 1], left, right.right);
    }
  }
}

}  // namespace mamba3::cuda
