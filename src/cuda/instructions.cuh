#pragma once

// The instructions of every card from compute capability 8.0 that CUDA C++ has no functions for.
// Addresses in shared memory are as those instructions want them, in 32 bits.

#include <cuda_runtime.h>

#include <cstdint>

// Declares the dynamic shared memory of the block as an array.
#define MAMBA3_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

namespace mamba3::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ inline uint32_t load_shared(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
  return value;
}
__device__ inline uint4 load_shared4(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}
__device__ inline void store_shared(uint32_t to, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}
__device__ inline void store_shared4(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// 16 bytes from global to shared memory, of which the first `bytes` are copied and the rest zeros.
__device__ inline void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// 4 bytes, or zeros.
__device__ inline void copy_async4(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(present ? 4 : 0)
               : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but the last kPending groups of this thread's copies have arrived.
template <int kPending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// Until all of this thread's copies have arrived.
__device__ inline void wait_all_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, by a warp: lane i names row i % 8 of
// matrix i / 8, and gets of each matrix the elements 2 (i % 4) and the next of row i / 4; or of
// column i / 4, if transposed.
template <bool kTransposed>
__device__ void load_matrices(uint32_t (&m)[4], uint32_t row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(row)
                 : "memory");
  }
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of bf16, by a warp. With r = lane / 4 and q = lane % 4 a
// lane has of a rows r and r + 8 at columns 2q, 2q+1, then the same at columns 2q+8, 2q+9; of b
// rows 2q, 2q+1 and 2q+8, 2q+9 of column r; of c columns 2q, 2q+1 of row r, and of row r + 8.
__device__ inline void multiply_add(float& c0, float& c1, float& c2, float& c3,
                                    const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two bf16 in a register; the first is the low half.
__device__ inline uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Adds eight bf16 to those in memory, each sum rounded; one thread's additions keep their order.
__device__ inline void add_to_memory(void* to, uint4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  uint4& sum = *static_cast<uint4*>(to);
  const auto add = [](uint32_t a, uint32_t b) {
    const auto half = [](uint32_t both, bool high) {
      return __uint_as_float(high ? both & 0xffff0000u : both << 16);
    };
    return pack_bf16(half(a, false) + half(b, false), half(a, true) + half(b, true));
  };
  sum = {add(sum.x, v.x), add(sum.y, v.y), add(sum.z, v.z), add(sum.w, v.w)};
#endif
}

// 2^x and 1/x, to some 2 units in the last place; tiny numbers are 0.
__device__ inline float fast_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float fast_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// A value of which the compiler knows nothing.
template <typename T>
__device__ T opaque(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 16 bytes of a weight, which are read once, by an instruction that stays before a wait for earlier
// kernels.
__device__ inline uint4 load_weight(const void* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// 16 bytes that are read once, by an instruction that stays where it is written.
__device__ inline uint4 load_once(const void* from) {
  uint4 v;
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
// 4 bytes as they are in the L2 cache, where add_to_memory() adds.
__device__ inline uint32_t load_from_l2(const void* from) {
  uint32_t value;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
// A number that no kernel writes meanwhile, by an instruction that keeps its order among such.
__device__ inline float load_constant(const float* from) {
  float value;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
  return value;
}
// Asks for the line of memory to be brought to the L2 cache, where what is written to it meanwhile
// is seen.
__device__ inline void prefetch_line(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

__device__ inline uint64_t nanoseconds_now() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

}  // namespace mamba3::cuda
