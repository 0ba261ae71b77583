#pragma once

// The exponentials of a product, on Hopper: out = exp2(log2(e) A B^T - shift) in bf16 with the sums
// of its rows, or the largest elements of A B^T, which never reach memory themselves. For the head
// of a language model, whose logits are wanted for their softmax only.
//
// Schedule. A tile of out is 128 x 256, K goes by 64. A block has three warpgroups and stays for
// many tiles. The first loads: one thread asks the copy engine for the operands of one step after
// the other, as far ahead as there are stages in shared memory. The other two have 64 rows of the
// tile each, with all sums in registers. They are not in step: the second starts some steps later,
// so that while one takes exponentials and stores, the other has the matrix units to itself. The
// stages must hold what lies between the two. Two blocks that are neighbours along M form a
// cluster: each loads half of B for both.
//
// Shared memory: `full[stage]` completes when the bytes of a stage have arrived, `empty[stage]`
// when the warpgroups of all blocks of the cluster have used it.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/instructions.cuh"

// Only machine code for 90a has the instructions; the others get an empty kernel.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MAMBA3_EXP_GEMM_CLUSTER(n) __cluster_dims__(n, 1, 1)
#else
#define MAMBA3_EXP_GEMM_CLUSTER(n)
#endif

namespace mamba3::cuda::exp_gemm {

inline constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kStages = 4;
inline constexpr int kUsers = 2, kRowsOfUser = kTileM / kUsers;  // warpgroups that multiply
inline constexpr int kWarpgroup = 128, kThreads = (kUsers + 1) * kWarpgroup;
inline constexpr int kSwizzle = 1024;  // bytes after which the pattern of the copy engine repeats
inline constexpr int kBytesA = kTileM * kTileK * 2, kBytesB = kTileN * kTileK * 2;
inline constexpr size_t kSharedBytes = kStages * (kBytesA + kBytesB) + kSwizzle;
inline constexpr float kLog2e = 1.4426950408889634f;

enum class Want : uint8_t { exponentials, sums, maxima };

struct Args {
  int64_t M, N, K;
  const float* shift;  // (M), in units of log 2; not used for maxima
  __nv_bfloat16* out;  // (M, width) or, for sums and maxima, not used
  int64_t width;       // a multiple of 8, at least N; columns from N on become 0
  float* partial;      // (M, tiles of N): sums, or maxima, of the rows of a tile
  int lag = 2;         // steps by which the second warpgroup starts later
};

__host__ __device__ constexpr int64_t tiles_along(int64_t N) {
  return (N + kTileN - 1) / kTileN;
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void expect_bytes(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Arrives at the barrier of the same place in a block of the cluster.
__device__ inline void arrive(uint64_t* barrier, unsigned block) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
__device__ inline void wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A box of the matrix from (row, column) on, to this block or to the same place in all blocks of
// the cluster.
template <int kBlocks>
__device__ void load_box(const CUtensorMap& map, void* to, uint64_t* full, int column, int row) {
  const auto address = reinterpret_cast<uint64_t>(&map);
  if constexpr (kBlocks == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(address), "r"(shared_address(full)), "r"(column), "r"(row)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
        "l"(address), "r"(shared_address(full)), "r"(column), "r"(row),
        "h"(static_cast<uint16_t>((1 << kBlocks) - 1))
        : "memory");
  }
}

__device__ inline unsigned block_of_cluster() {
  unsigned block;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
}
__device__ inline void synchronize_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Rows of 128 bytes, swizzled in groups of eight.
__device__ inline uint64_t descriptor_of(const void* tile) {
  const uint64_t address = shared_address(tile) >> 4 & 0x3FFF;
  return address | uint64_t{1} << 16 | uint64_t{kSwizzle >> 4} << 32 | uint64_t{1} << 62;
}

// d (64, 256) = a (64, 16) b^T (16, 256) + (add ? d : 0), asynchronously.
__device__ inline void multiply(float (&d)[128], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, "
      "%72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, "
      "%88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, "
      "%104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, "
      "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, add, 1, 1, 0, 0;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
        "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
        "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
        "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
        "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
        "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
        "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
        "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
        "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
        "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(add));
}
// The compiler may not move uses of the sums across this.
__device__ inline void hold(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kOpen>
__device__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}

// Lane q of four has word[i] of block i at place q; gets those of block q, in order of their
// places.
__device__ inline uint4 transposed(const uint32_t (&word)[4], int q) {
  const bool high = (q & 2) != 0, odd = (q & 1) != 0;
  const uint32_t mine0 = high ? word[2] : word[0], mine1 = high ? word[3] : word[1];
  const uint32_t far0 = __shfl_xor_sync(~0u, high ? word[0] : word[2], 2);
  const uint32_t far1 = __shfl_xor_sync(~0u, high ? word[1] : word[3], 2);
  const uint32_t near_other = __shfl_xor_sync(~0u, odd ? mine0 : mine1, 1);
  const uint32_t far_other = __shfl_xor_sync(~0u, odd ? far0 : far1, 1);
  const uint32_t near_own = odd ? mine1 : mine0, far_own = odd ? far1 : far0;
  const uint32_t near0 = odd ? near_other : near_own, near1 = odd ? near_own : near_other;
  const uint32_t far_0 = odd ? far_other : far_own, far_1 = odd ? far_own : far_other;
  return high ? uint4{far_0, far_1, near0, near1} : uint4{near0, near1, far_0, far_1};
}

// Lane l has, of each eight columns j of a warp's 16 rows, d[4j], d[4j+1] at row l/4 and d[4j+2],
// d[4j+3] eight rows below, at columns 8j + 2 (l%4) and the next.
template <Want want>
__device__ void finish_tile(const Args& a, float (&d)[128], const float (&shift)[2], int64_t row,
                            unsigned tile, unsigned tiles) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const int64_t column = static_cast<int64_t>(tile) * kTileN;
  const int left = static_cast<int>(min(a.N - column, int64_t{kTileN}));  // columns that exist
  const int wide = static_cast<int>(min(a.width - column, int64_t{kTileN}));
  __nv_bfloat16* const out = a.out + row * a.width + column + q * 8;
  if (left < kTileN) {
#pragma unroll
    for (int i = 0; i < 128; ++i)
      if (i / 4 * 8 + 2 * q + i % 2 >= left) d[i] = -INFINITY;
  }
  float result[2];
  result[0] = result[1] = want == Want::maxima ? -INFINITY : 0.0f;
#pragma unroll
  for (int group = 0; group < 8; ++group) {  // of 32 columns
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          x[c] = d[(4 * group + i) * 4 + 2 * half + c];
          if constexpr (want == Want::maxima) {
            result[half] = fmaxf(result[half], x[c]);
          } else {
            x[c] = fast_exp2(fmaf(x[c], kLog2e, -shift[half]));
            result[half] += x[c];
          }
        }
        word[i] = pack_bf16(x[0], x[1]);
      }
      if constexpr (want == Want::exponentials) {
        const uint4 eight = transposed(word, q);
        if (row + 8 * half < a.M && group * 32 + q * 8 < wide)
          __stcs(reinterpret_cast<uint4*>(out + half * 8 * a.width + group * 32), eight);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float& r = result[half];
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
      const float other = __shfl_xor_sync(~0u, r, lane);
      r = want == Want::maxima ? fmaxf(r, other) : r + other;
    }
    const int64_t m = row + 8 * half;
    if (q == 0 && m < a.M) a.partial[m * tiles + tile] = r;
  }
}

// The place in the ring of stages, and how often it was passed.
struct Place {
  int stage = 0;
  unsigned round = 0;
  __device__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    round ^= 1;
  }
};

#endif  // 90a

template <Want want, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1) MAMBA3_EXP_GEMM_CLUSTER(kBlocks)
    run(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
        Args a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  MAMBA3_DYNAMIC_SHARED(uint8_t, dynamic);
  __shared__ uint64_t full[kStages], empty[kStages];
  uint8_t* const tiles_a = dynamic + (kSwizzle - shared_address(dynamic) % kSwizzle) % kSwizzle;
  uint8_t* const tiles_b = tiles_a + kStages * kBytesA;
  const unsigned block = kBlocks == 1 ? 0 : block_of_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      init(&full[i], 1);
      init(&empty[i], kUsers * kBlocks);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if constexpr (kBlocks > 1) synchronize_cluster();

  // Tiles of one column of tiles follow each other, so that its part of B is read once.
  const auto tiles = static_cast<unsigned>(tiles_along(a.N));
  const auto down = static_cast<unsigned>((a.M + kTileM * kBlocks - 1) / (kTileM * kBlocks));
  const int steps = static_cast<int>((a.K + kTileK - 1) / kTileK);
  const unsigned clusters = gridDim.x / kBlocks, first = blockIdx.x / kBlocks;
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  Place place;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      constexpr int kShare = kTileN / kBlocks;  // rows of B that this block loads
      for (unsigned at = first; at < tiles * down; at += clusters) {
        const int m = static_cast<int>((at % down * kBlocks + block) * kTileM);
        const int n = static_cast<int>(at / down * kTileN + block * kShare);
        for (int step = 0; step < steps; ++step, place.next()) {
          uint64_t* const arrived = &full[place.stage];
          wait(&empty[place.stage], place.round ^ 1);
          expect_bytes(arrived, kBytesA + kBytesB);
          load_box<1>(map_a, tiles_a + place.stage * kBytesA, arrived, step * kTileK, m);
          load_box<kBlocks>(map_b, tiles_b + place.stage * kBytesB + block * (kShare * kTileK * 2),
                            arrived, step * kTileK, n);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int user = group - 1;
    const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
    const int row = user * kRowsOfUser + thread / 32 * 16 + thread % 32 / 4;
    const auto release = [&](int stage) {
      if (thread < kBlocks) arrive(&empty[stage], static_cast<unsigned>(thread));
    };
    bool starting = a.lag > 0;
    const int lag = min(a.lag, steps);
    float d[128];
    for (unsigned at = first; at < tiles * down; at += clusters) {
      const unsigned tile = at / down;
      const int64_t m = (at % down * kBlocks + block) * kTileM + row;
      float shift[2] = {0, 0};
      if constexpr (want != Want::maxima) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (m + 8 * half < a.M) shift[half] = a.shift[m + 8 * half];
      }
      if (starting && user == 1) asm volatile("barrier.sync 1, 256;" ::: "memory");
      int before = 0;  // the stage of the step before
      for (int step = 0; step < steps; ++step, place.next()) {
        wait(&full[place.stage], place.round);
        const uint64_t from_a =
            descriptor_of(tiles_a + place.stage * kBytesA + user * (kRowsOfUser * kTileK * 2));
        const uint64_t from_b = descriptor_of(tiles_b + place.stage * kBytesB);
        begin_products();
#pragma unroll
        for (int k = 0; k < kTileK / 16; ++k)  // 16 columns are 32 bytes, in units of 16
          multiply(d, from_a + 2 * k, from_b + 2 * k, step > 0 || k > 0);
        end_products();
        if (starting && user == 0 && step + 1 == lag)
          asm volatile("barrier.arrive 1, 256;" ::: "memory");
        wait_for_products<1>();
        if (step > 0) release(before);
        before = place.stage;
      }
      wait_for_products<0>();
      release(before);
      hold(d);
      starting = false;
      finish_tile<want>(a, d, shift, m, tile, tiles);
    }
  }
  // A block's memory and barriers are used by its neighbour until that is done.
  if constexpr (kBlocks > 1) {
    __syncwarp();
    synchronize_cluster();
  }
#endif
}

// Blocks to launch on so many multiprocessors.
inline unsigned blocks(int64_t M, int64_t N, int multiprocessors, int in_cluster) {
  const int64_t tile = int64_t{kTileM} * in_cluster;
  const int64_t clusters = (M + tile - 1) / tile * tiles_along(N),
                most = multiprocessors / in_cluster;
  return static_cast<unsigned>((clusters < most ? clusters : most) * in_cluster);
}

// A matrix (rows, columns) whose rows are `stride` elements apart, in boxes of so many rows. False
// if the driver does not know how.
inline bool describe(CUtensorMap& map, const void* matrix, int64_t rows, int64_t columns,
                     int64_t stride, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &result);
    const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    if (status != cudaSuccess) cudaGetLastError();
    return found ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * sizeof(__nv_bfloat16)};
  const cuuint32_t box[] = {kTileK, static_cast<cuuint32_t>(box_rows)}, each[] = {1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes,
                strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether the device is a Hopper GPU and the program has code of 90a for it, whose barriers other
// code lacks.
inline bool available() {
  static const bool known = [] {
    int major = 0, minor = 0;
    cudaFuncAttributes attributes{};
    const bool hopper =
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0) == cudaSuccess &&
        major == 9 && minor == 0;
    const bool ours = hopper &&
                      cudaFuncGetAttributes(&attributes, run<Want::sums, 1>) == cudaSuccess &&
                      attributes.sharedSizeBytes > 0;
    cudaGetLastError();
    return ours;
  }();
  return known;
}

}  // namespace mamba3::cuda::exp_gemm

#undef MAMBA3_EXP_GEMM_CLUSTER
