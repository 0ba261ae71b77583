#pragma once

// src/cuda/instructions.cuh for the emulator. Copies arrive at once, and what is asked for from a
// cache is not.

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>

#include "core/dtype.h"

#define MAMBA3_DYNAMIC_SHARED(type, name) \
  auto* const name = reinterpret_cast<type*>(mamba3::emulation::dynamic_shared)

namespace mamba3::cuda {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pointer));
}
inline char* in_shared(uint32_t address) {
  return reinterpret_cast<char*>(static_cast<uintptr_t>(address));
}
inline uint32_t load_shared(uint32_t from) {
  return *reinterpret_cast<const uint32_t*>(in_shared(from));
}
inline uint4 load_shared4(uint32_t from) {
  return *reinterpret_cast<const uint4*>(in_shared(from));
}
inline void store_shared(uint32_t to, uint32_t value) {
  *reinterpret_cast<uint32_t*>(in_shared(to)) = value;
}
inline void store_shared4(uint32_t to, uint4 value) {
  *reinterpret_cast<uint4*>(in_shared(to)) = value;
}

inline void copy_async(uint32_t to, const void* from, int bytes) {
  std::memset(in_shared(to), 0, 16);
  std::memcpy(in_shared(to), from, static_cast<size_t>(bytes));
}
inline void copy_async4(uint32_t to, const void* from, bool present) {
  store_shared(to, present ? *static_cast<const uint32_t*>(from) : 0);
}
inline void commit_copies() {}
template <int kPending>
void wait_copies() {}
inline void wait_all_copies() {}

template <bool kTransposed>
void load_matrices(uint32_t (&m)[4], uint32_t row) {
  uint32_t rows[emulation::kWarp] = {};
  emulation::exchange(row, rows);
  const int lane = emulation::lane(), r = lane / 4, q = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const auto element = [&](int at, int column) {
      return uint32_t{*reinterpret_cast<const uint16_t*>(in_shared(rows[i * 8 + at]) + 2 * column)};
    };
    m[i] = kTransposed ? element(q, r) | element(q + 1, r) << 16
                       : element(r, q) | element(r, q + 1) << 16;
  }
}

inline void multiply_add(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                         uint32_t b0, uint32_t b1) {
  struct Mine {
    uint32_t a[4], b[2];
  };
  Mine all[emulation::kWarp] = {};
  emulation::exchange(Mine{{a[0], a[1], a[2], a[3]}, {b0, b1}}, all);
  const auto half = [](uint32_t both, int which) {
    return __uint_as_float(which == 0 ? both << 16 : both & 0xffff0000u);
  };
  const int r = emulation::lane() / 4, q = emulation::lane() % 4;
  float* const c[2][2] = {{&c0, &c1}, {&c2, &c3}};
  for (int down = 0; down < 2; ++down) {
    for (int right = 0; right < 2; ++right) {
      float sum = *c[down][right];
      for (int k = 0; k < 16; ++k) {
        const float left = half(all[r * 4 + k % 8 / 2].a[k / 8 * 2 + down], k % 2);
        const float above = half(all[(2 * q + right) * 4 + k % 8 / 2].b[k / 8], k % 2);
        sum += left * above;
      }
      *c[down][right] = sum;
    }
  }
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{mamba3::bf16(low).bits} | uint32_t{mamba3::bf16(high).bits} << 16;
}
inline void add_to_memory(void* to, uint4 v) {
  uint32_t add[4] = {v.x, v.y, v.z, v.w}, *const sum = static_cast<uint32_t*>(to);
  for (int i = 0; i < 4; ++i) {
    sum[i] =
        pack_bf16(__uint_as_float(sum[i] << 16) + __uint_as_float(add[i] << 16),
                  __uint_as_float(sum[i] & 0xffff0000u) + __uint_as_float(add[i] & 0xffff0000u));
  }
}
inline float fast_exp2(float x) {
  return std::exp2(x);
}
inline float fast_reciprocal(float x) {
  return 1 / x;
}

template <typename T>
T opaque(T value) {
  return value;
}

inline uint4 load_weight(const void* from) {
  return *static_cast<const uint4*>(from);
}
inline uint4 load_once(const void* from) {
  return *static_cast<const uint4*>(from);
}
inline uint32_t load_from_l2(const void* from) {
  return *static_cast<const uint32_t*>(from);
}
inline float load_constant(const float* from) {
  return *from;
}
inline void prefetch_line(const void*) {}

inline uint64_t nanoseconds_now() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

}  // namespace mamba3::cuda
