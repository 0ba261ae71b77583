#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

namespace mamba3 {

// Element types of tensors. i64 and f64 are those of files, counters and a sum.
enum class DType : uint8_t { f32, bf16, f16, i32, i64, f64, u8 };

int64_t size_of(DType dtype);
std::string_view name_of(DType dtype);  // "f32", "bf16", ...

// bfloat16: the upper half of an IEEE float. Conversion from float rounds to nearest even and keeps
// NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? static_cast<uint16_t>((u >> 16) | 0x40u)
               : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};

// IEEE binary16. Conversion from float rounds to nearest even.
struct f16 {
  uint16_t bits = 0;
  f16() = default;
  explicit f16(float value);
  explicit operator float() const;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<f16> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::i64;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::u8;
};

// Converts n elements of any floating type to float. `source` need not be aligned.
void to_float(const void* source, DType dtype, float* out, int64_t n);
// Converts n floats to `dtype` (f32, bf16 or f16).
void from_float(const float* source, void* out, DType dtype, int64_t n);

}  // namespace mamba3
