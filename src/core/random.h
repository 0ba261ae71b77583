#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace mamba3 {

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 128 random
// bits as a pure function of a key and a 128-bit counter. No state, so any draw can be made by any
// thread, on any device, in any order. (constexpr is what lets GPU code call this.)
constexpr std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_high,
                                         uint64_t counter_low) {
  std::array<uint32_t, 4> c = {
      static_cast<uint32_t>(counter_low), static_cast<uint32_t>(counter_low >> 32),
      static_cast<uint32_t>(counter_high), static_cast<uint32_t>(counter_high >> 32)};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// The seed of one use of randomness ("data", a tensor's name): uses do not share draws.
inline uint64_t derive_seed(uint64_t seed, std::string_view use) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : use) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  const auto bits = philox(seed, hash, 0);
  return (uint64_t{bits[1]} << 32) | bits[0];
}

// The sequence of draws named (seed, stream, row): two Randoms of equal names draw the same.
class Random {
 public:
  constexpr explicit Random(uint64_t seed, uint64_t stream = 0, uint32_t row = 0)
      : seed_(seed), stream_(stream), counter_(uint64_t{row} << 32) {}

  constexpr uint32_t bits() {
    if (left_ == 0) {
      block_ = philox(seed_, stream_, counter_++);
      left_ = 4;
    }
    return block_[static_cast<size_t>(4 - left_--)];
  }
  // [0, 1), a multiple of 2^-53.
  constexpr double uniform() {
    const uint64_t high = bits();
    return static_cast<double>(((high << 32) | bits()) >> 11) * 0x1p-53;
  }
  // 0 .. n-1, n >= 1. The bias is below n / 2^53.
  int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * static_cast<double>(n)); }
  // Mean 0, variance 1 (Box and Muller 1958).
  double normal() {
    const double radius = std::sqrt(-2 * std::log1p(-uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }

 private:
  uint64_t seed_, stream_, counter_;
  std::array<uint32_t, 4> block_{};
  int left_ = 0;
};

}  // namespace mamba3
