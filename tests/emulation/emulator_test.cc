#include "emulator.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <vector>

#include "cuda/instructions.cuh"

// The GPU that others are tested on. See tests/emulation/emulator.h.

namespace mamba3::emulation {
namespace {

TEST(Emulator, RunsEveryThreadOfEveryBlock) {
  std::vector<int> count(2 * 3 * 40);
  run({2, 3}, {8, 5}, 0, [&] {
    const unsigned b = blockIdx.y * gridDim.x + blockIdx.x;
    ++count[b * 40 + threadIdx.y * blockDim.x + threadIdx.x];
  });
  EXPECT_EQ(count, std::vector<int>(2 * 3 * 40, 1));
}

TEST(Emulator, ABarrierIsPassedWhenAllHaveCome) {
  constexpr int kThreads = 70;
  int came = 0, early = 0;
  run(1, kThreads, 0, [&] {
    for (int round = 1; round <= 5; ++round) {
      ++came;
      __syncthreads();
      early += came < round * kThreads ? 1 : 0;
      __syncthreads();
    }
  });
  EXPECT_EQ(early, 0);
}

TEST(Emulator, NobodyWaitsForThreadsThatHaveEnded) {
  int passed = 0;
  run(1, 64, 0, [&] {
    if (threadIdx.x % 3 == 0) return;
    __syncthreads();
    __syncwarp();
    ++passed;
  });
  EXPECT_EQ(passed, 42);
}

TEST(Emulator, ThreadsThatWaitForEachOtherAreAnError) {
  EXPECT_THROW(run(1, 64, 0,
                   [] {
                     if (threadIdx.x < 32) {
                       __syncthreads();
                     } else if (threadIdx.x == 40) {
                       __syncwarp();
                       __syncwarp();
                     } else {
                       __syncwarp();
                       __syncthreads();
                     }
                   }),
               std::logic_error);
  int ran = 0;
  run(1, 3, 0, [&] { ++ran; });
  EXPECT_EQ(ran, 3);
}

TEST(Emulator, WantsBlocksThatAGpuHas) {
  EXPECT_THROW(run(1, 1025, 0, [] {}), std::logic_error);
  EXPECT_THROW(run(1, 1, kSharedBytes + 1, [] {}), std::logic_error);
}

TEST(Emulator, LanesReadWhatOthersHave) {
  run(1, 64, 0, [] {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    EXPECT_EQ(__shfl_sync(~0u, lane, 5), 5);
    EXPECT_EQ(__shfl_sync(~0u, lane, 1, 4), lane / 4 * 4 + 1);
    EXPECT_EQ(__shfl_xor_sync(~0u, lane, 9), lane ^ 9);
    EXPECT_EQ(__shfl_up_sync(~0u, lane, 2), lane < 2 ? lane : lane - 2);
    EXPECT_EQ(__shfl_down_sync(~0u, lane, 3, 8), lane % 8 > 4 ? lane : lane + 3);
    EXPECT_EQ(__reduce_max_sync(~0u, lane), 31);
    EXPECT_EQ(__match_any_sync(~0u, lane / 16), lane < 16 ? 0xffffu : 0xffff0000u);
    EXPECT_EQ(__syncthreads_or(threadIdx.x == 40 ? 1 : 0), 1);
    EXPECT_EQ(__syncthreads_or(0), 0);
  });
}

TEST(Emulator, DynamicSharedMemoryIsNaNAtFirst) {
  run(2, 1, 8, [] {
    MAMBA3_DYNAMIC_SHARED(float, shared);
    EXPECT_NE(shared[0], shared[0]);
    EXPECT_NE(shared[1], shared[1]);
    shared[0] = 1;
  });
}

// Element (row, column) of the matrices below: small whole numbers, no two rows or columns alike.
float left_at(int row, int column) {
  return static_cast<float>((row * 5 + column * 3) % 17 - 8);
}
float right_at(int row, int column) {
  return static_cast<float>((row * 7 + column * 11) % 13 - 6);
}

// As kernels do it: both operands from rows in shared memory, the right one as it is or transposed.
TEST(Emulator, MultipliesWhatItLoadsAsTensorCoresDo) {
  constexpr int kPitch = 24;  // elements
  run(1, 32, 3 * 16 * kPitch * 2, [] {
    MAMBA3_DYNAMIC_SHARED(mamba3::bf16, shared);
    auto *const left = shared, *const right = shared + 16 * kPitch,
                *const transposed = shared + 32 * kPitch;
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 16 * 16; i += 32) {
      const int row = i / 16, column = i % 16;
      left[row * kPitch + column] = mamba3::bf16(left_at(row, column));
      right[row * kPitch + column] = mamba3::bf16(right_at(row, column));
      transposed[column * kPitch + row] = mamba3::bf16(right_at(row, column));
    }
    __syncwarp();
    uint32_t a[4], b[4], same[4];
    const int low = lane % 16, high = lane / 16 * 8;
    cuda::load_matrices<false>(a, cuda::shared_address(left + low * kPitch + high));
    cuda::load_matrices<true>(b, cuda::shared_address(right + low * kPitch + high));
    cuda::load_matrices<false>(
        same, cuda::shared_address(transposed + (high + lane % 8) * kPitch + lane / 8 % 2 * 8));
    for (int i = 0; i < 4; ++i) EXPECT_EQ(b[i], same[i]);
    for (int half = 0; half < 2; ++half) {
      float c[4] = {1, 2, 3, 4};
      cuda::multiply_add(c[0], c[1], c[2], c[3], a, b[2 * half], b[2 * half + 1]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
        float want = static_cast<float>(i + 1);
        for (int k = 0; k < 16; ++k) want += left_at(row, k) * right_at(k, column);
        EXPECT_EQ(c[i], want);
      }
    }
  });
}

}  // namespace
}  // namespace mamba3::emulation
