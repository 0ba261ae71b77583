#pragma once

// Products of a warpgroup on Hopper: 4 warps have 16 rows each of A, in registers, and of the sums;
// B is read from shared memory once for all of them. Fragments and tiles are those of mma.cuh; a
// tile must begin at a multiple of 1024 bytes.

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
// tile (64, N), of whose rows 16 from `row` on are. Bytes between groups of 8 rows, and between
// panels.
template <int kColumns>
__device__ uint64_t columns_of(const SharedTile<kColumns>& tile, int column) {
  using Tile = SharedTile<kColumns>;
  const uint32_t address =
      tile.base + static_cast<uint32_t>(column / 64 * Tile::kPanelBytes + column % 64 * 2);
  return uint64_t{address >> 4 & 0x3FFF} | uint64_t{1} << 16 |
         uint64_t{8 * Tile::kRowBytes >> 4} << 32 | uint64_t{1} << 62;
}
template <int kColumns>
__device__ uint64_t rows_of(const SharedTile<kColumns>& tile, int row) {
  using Tile = SharedTile<kColumns>;
  const uint32_t address = tile.base + static_cast<uint32_t>(row * Tile::kRowBytes);
  return uint64_t{address >> 4 & 0x3FFF} | uint64_t{Tile::kPanelBytes >> 4} << 16 |
         uint64_t{8 * Tile::kRowBytes >> 4} << 32 | uint64_t{1} << 62;
}

// d (64, 8 tiles) = a (64, 16) b (16, 8 tiles) + (add ? d : 0).
template <bool kTransposed>
__device__ void multiply_async(FragmentC (&d)[8], const FragmentA& a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\n"
      "setp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
      "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}\n"
      : "+f"(d[0].at[0]), "+f"(d[0].at[1]), "+f"(d[0].at[2]), "+f"(d[0].at[3]), "+f"(d[1].at[0]),
        "+f"(d[1].at[1]), "+f"(d[1].at[2]), "+f"(d[1].at[3]), "+f"(d[2].at[0]), "+f"(d[2].at[1]),
        "+f"(d[2].at[2]), "+f"(d[2].at[3]), "+f"(d[3].at[0]), "+f"(d[3].at[1]), "+f"(d[3].at[2]),
        "+f"(d[3].at[3]), "+f"(d[4].at[0]), "+f"(d[4].at[1]), "+f"(d[4].at[2]), "+f"(d[4].at[3]),
        "+f"(d[5].at[0]), "+f"(d[5].at[1]), "+f"(d[5].at[2]), "+f"(d[5].at[3]), "+f"(d[6].at[0]),
        "+f"(d[6].at[1]), "+f"(d[6].at[2]), "+f"(d[6].at[3]), "+f"(d[7].at[0]), "+f"(d[7].at[1]),
        "+f"(d[7].at[2]), "+f"(d[7].at[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}
template <bool kTransposed>
__device__ void multiply_async(FragmentC (&d)[16], const FragmentA& a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\n"
      "setp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}\n"
      : "+f"(d[0].at[0]), "+f"(d[0].at[1]), "+f"(d[0].at[2]), "+f"(d[0].at[3]), "+f"(d[1].at[0]),
        "+f"(d[1].at[1]), "+f"(d[1].at[2]), "+f"(d[1].at[3]), "+f"(d[2].at[0]), "+f"(d[2].at[1]),
        "+f"(d[2].at[2]), "+f"(d[2].at[3]), "+f"(d[3].at[0]), "+f"(d[3].at[1]), "+f"(d[3].at[2]),
        "+f"(d[3].at[3]), "+f"(d[4].at[0]), "+f"(d[4].at[1]), "+f"(d[4].at[2]), "+f"(d[4].at[3]),
        "+f"(d[5].at[0]), "+f"(d[5].at[1]), "+f"(d[5].at[2]), "+f"(d[5].at[3]), "+f"(d[6].at[0]),
        "+f"(d[6].at[1]), "+f"(d[6].at[2]), "+f"(d[6].at[3]), "+f"(d[7].at[0]), "+f"(d[7].at[1]),
        "+f"(d[7].at[2]), "+f"(d[7].at[3]), "+f"(d[8].at[0]), "+f"(d[8].at[1]), "+f"(d[8].at[2]),
        "+f"(d[8].at[3]), "+f"(d[9].at[0]), "+f"(d[9].at[1]), "+f"(d[9].at[2]), "+f"(d[9].at[3]),
        "+f"(d[10].at[0]), "+f"(d[10].at[1]), "+f"(d[10].at[2]), "+f"(d[10].at[3]),
        "+f"(d[11].at[0]), "+f"(d[11].at[1]), "+f"(d[11].at[2]), "+f"(d[11].at[3]),
        "+f"(d[12].at[0]), "+f"(d[12].at[1]), "+f"(d[12].at[2]), "+f"(d[12].at[3]),
        "+f"(d[13].at[0]), "+f"(d[13].at[1]), "+f"(d[13].at[2]), "+f"(d[13].at[3]),
        "+f"(d[14].at[0]), "+f"(d[14].at[1]), "+f"(d[14].at[2]), "+f"(d[14].at[3]),
        "+f"(d[15].at[0]), "+f"(d[15].at[1]), "+f"(d[15].at[2]), "+f"(d[15].at[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "l"(b), "r"(static_cast<int>(add)),
        "n"(kTransposed ? 1 : 0));
}

#endif

}  // namespace mamba3::cuda
