#pragma once

// Products of a warpgroup on Hopper: 4 warps have 16 rows each of the sums, and of A, which is in
// registers or in shared memory; B is read from shared memory once for all of them. Fragments and
// tiles are those of mma.cuh; a tile must begin at a multiple of 1024 bytes.

#include "cuda/mma.cuh"

namespace mamba3::cuda {

// What threads have written to shared memory can then, after a barrier, be read as B.
__device__ inline void publish_tiles() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before products whose registers the thread has written since the last ones.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kPending groups are done.
template <int kPending>
__device__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// As B: a tile (64, K), of whose columns 16 from `column` on are the sum's index; or, transposed, a
// tile (64, N), of whose rows 16 from `row` on are. The low word begins with the address, to which
// steps are added, then has the bytes between panels; the high word has those between groups of 8
// rows, and how columns are permuted.
template <int kColumns>
__device__ uint64_t in_tile(const SharedTile<kColumns>& tile, int panels, int step) {
  const uint32_t low = ((tile.base >> 4 & 0x3FFF) | static_cast<uint32_t>(panels >> 4 << 16)) +
                       static_cast<uint32_t>(step >> 4);
  constexpr uint32_t kHigh = 8 * SharedTile<kColumns>::kRowBytes >> 4 | 1u << 30;
  return uint64_t{kHigh} << 32 | low;
}
template <int kColumns>
__device__ uint64_t columns_of(const SharedTile<kColumns>& tile, int column) {
  using Tile = SharedTile<kColumns>;
  return in_tile(tile, 16, column / 64 * Tile::kPanelBytes + column % 64 * 2);
}
template <int kColumns>
__device__ uint64_t rows_of(const SharedTile<kColumns>& tile, int row) {
  using Tile = SharedTile<kColumns>;
  return in_tile(tile, Tile::kPanelBytes, row * Tile::kRowBytes);
}

// The sums of 4 tiles from tile i on, as operands of an instruction; and the names of 16 operands.
#define MAMBA3_TILE(d, i) \
  "+f"((d)[i].at[0]), "+f"((d)[i].at[1]), "+f"((d)[i].at[2]), "+f"((d)[i].at[3])
#define MAMBA3_4_TILES(d, i) \
  MAMBA3_TILE(d, i), MAMBA3_TILE(d, i + 1), MAMBA3_TILE(d, i + 2), MAMBA3_TILE(d, i + 3)
#define MAMBA3_SUMS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MAMBA3_SUMS_16 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MAMBA3_SUMS_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MAMBA3_SUMS_48 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64, 8 tiles) = a (64, 16) b (16, 8 tiles) + (add ? d : 0).
template <bool kTransposed>
__device__ void multiply_async(FragmentC (&d)[8], const FragmentA& a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MAMBA3_SUMS_0 ", " MAMBA3_SUMS_16
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}\n"
      : MAMBA3_4_TILES(d, 0), MAMBA3_4_TILES(d, 4)
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}
template <bool kTransposed>
__device__ void multiply_async(FragmentC (&d)[16], const FragmentA& a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\n"
      "setp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MAMBA3_SUMS_0 ", " MAMBA3_SUMS_16
      ", " MAMBA3_SUMS_32 ", " MAMBA3_SUMS_48 "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}\n"
      : MAMBA3_4_TILES(d, 0), MAMBA3_4_TILES(d, 4), MAMBA3_4_TILES(d, 8), MAMBA3_4_TILES(d, 12)
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}
// d += a b with A in shared memory too: 16 columns of a tile (64, K), or transposed 16 rows of a
// tile (K, 64); also of 4 tiles.
template <bool kTransA, bool kTransB>
__device__ void multiply_async(FragmentC (&d)[8], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MAMBA3_SUMS_0
               ", " MAMBA3_SUMS_16 "}, %32, %33, 1, 1, 1, %34, %35;\n"
               : MAMBA3_4_TILES(d, 0), MAMBA3_4_TILES(d, 4)
               : "l"(a), "l"(b), "n"(kTransA ? 1 : 0), "n"(kTransB ? 1 : 0));
}
template <bool kTransA, bool kTransB>
__device__ void multiply_async(FragmentC (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" MAMBA3_SUMS_0
               "}, %16, %17, 1, 1, 1, %18, %19;\n"
               : MAMBA3_4_TILES(d, 0)
               : "l"(a), "l"(b), "n"(kTransA ? 1 : 0), "n"(kTransB ? 1 : 0));
}

#undef MAMBA3_TILE
#undef MAMBA3_4_TILES
#undef MAMBA3_SUMS_0
#undef MAMBA3_SUMS_16
#undef MAMBA3_SUMS_32
#undef MAMBA3_SUMS_48

#endif

// multiply() of mma.cuh by the 4 warps of a warpgroup together, from tiles that have been
// published. On Hopper the sums are not there, and not to be touched, until finish_products().
template <bool kTransA, bool kTransB, int kInner, int kTiles, int kA, int kB>
__device__ void start_product(FragmentC (&sums)[kTiles], const SharedTile<kA>& a,
                              const SharedTile<kB>& b, int row, int first, int begin = 0,
                              int end = kInner) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const SharedTile<kB> part{
      b.base + static_cast<uint32_t>(kTransB
                                         ? first / 64 * SharedTile<kB>::kPanelBytes + first % 64 * 2
                                         : first * SharedTile<kB>::kRowBytes)};
  begin_products();
#pragma unroll
  for (int i = 0; i < kInner; i += 16) {
    multiply_async<kTransA, kTransB>(sums, kTransA ? rows_of(a, i) : columns_of(a, i),
                                     kTransB ? rows_of(part, i) : columns_of(part, i));
  }
  commit_products();
#else
  multiply<kTransA, kTransB, kInner>(sums, a, b, row, first, begin, end);
#endif
}
// Waits for all but the last kPending products that were started.
template <int kPending>
__device__ void finish_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wait_products<kPending>();
#endif
}

}  // namespace mamba3::cuda
