#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "mamba3/error.h"

namespace mamba3 {
namespace {

// A 16-bit float as IEEE 754 defines it, in float64: what the conversions are held against.
struct Format {
  int exponent_bits;
  int mantissa_bits;

  double decode(uint16_t bits) const {
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) {
      return mantissa ? std::numeric_limits<double>::quiet_NaN()
                      : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
  }
};
constexpr Format kBf16{8, 7};
constexpr Format kF16{5, 10};

template <typename T>
T from_bits(uint32_t bits) {
  T value;
  value.bits = static_cast<uint16_t>(bits);
  return value;
}

template <typename T>
void expect_exact_decoding(const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double want = format.decode(static_cast<uint16_t>(bits));
    const auto got = static_cast<float>(from_bits<T>(bits));
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(static_cast<double>(got), want) << bits;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << bits;
    }
  }
}

TEST(DType, EveryBf16DecodesExactly) {
  expect_exact_decoding<bf16>(kBf16);
}

TEST(DType, EveryF16DecodesExactly) {
  expect_exact_decoding<f16>(kF16);
}

// For each pair of neighbours: both encode to themselves, values between them to the nearer one,
// and the middle to the one whose last bit is 0.
template <typename T>
void expect_nearest_even_encoding(const Format& format, uint32_t infinity) {
  const auto encode = [](double value) { return T(static_cast<float>(value)).bits; };
  for (uint32_t low = 0; low < infinity; ++low) {
    const double a = format.decode(static_cast<uint16_t>(low));
    // The neighbour of the largest number would be a power of two; beyond the middle is infinity.
    const double b = low + 1 < infinity ? format.decode(static_cast<uint16_t>(low + 1))
                                        : 2 * a - format.decode(static_cast<uint16_t>(low - 1));
    const double middle = (a + b) / 2;
    for (const double sign : {1.0, -1.0}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      ASSERT_EQ(encode(sign * a), low | sign_bit);
      const float exact_middle = static_cast<float>(middle);
      // A bf16 subnormal's middle has no spare bits problem: float subnormals reach 16 bits lower.
      ASSERT_EQ(static_cast<double>(exact_middle), middle);
      const uint32_t even = low % 2 == 0 ? low : low + 1;
      ASSERT_EQ(encode(sign * middle), even | sign_bit) << low;
      ASSERT_EQ(encode(sign * std::nextafter(exact_middle, 0.0f)), low | sign_bit) << low;
      ASSERT_EQ(encode(sign * std::nextafter(exact_middle, HUGE_VALF)), (low + 1) | sign_bit)
          << low;
    }
  }
}

TEST(DType, Bf16EncodingRoundsToNearestEven) {
  expect_nearest_even_encoding<bf16>(kBf16, 0x7f80);
}

TEST(DType, F16EncodingRoundsToNearestEven) {
  expect_nearest_even_encoding<f16>(kF16, 0x7c00);
}

template <typename T>
void expect_special_values(uint16_t infinity) {
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(T(inf).bits, infinity);
  EXPECT_EQ(T(-inf).bits, infinity | 0x8000);
  EXPECT_EQ(T(std::numeric_limits<float>::max()).bits, infinity);
  EXPECT_EQ(T(0.0f).bits, 0);
  EXPECT_EQ(T(-0.0f).bits, 0x8000);
  EXPECT_EQ(T(std::numeric_limits<float>::denorm_min()).bits, 0);
  // NaN stays NaN, also one whose payload sits in the bits that are cut off.
  for (const uint32_t bits : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff800001u, 0x7fffffffu}) {
    EXPECT_TRUE(std::isnan(static_cast<float>(T(std::bit_cast<float>(bits))))) << bits;
    EXPECT_EQ(T(std::bit_cast<float>(bits)).bits >> 15, bits >> 31);
  }
}

TEST(DType, Bf16SpecialValues) {
  expect_special_values<bf16>(0x7f80);
}

TEST(DType, F16SpecialValues) {
  expect_special_values<f16>(0x7c00);
}

TEST(DType, SizesAndNames) {
  const struct {
    DType dtype;
    int64_t size;
    std::string_view name;
  } rows[] = {{DType::f32, 4, "f32"}, {DType::bf16, 2, "bf16"}, {DType::f16, 2, "f16"},
              {DType::i32, 4, "i32"}, {DType::i64, 8, "i64"},   {DType::f64, 8, "f64"},
              {DType::u8, 1, "u8"}};
  for (const auto& row : rows) {
    EXPECT_EQ(size_of(row.dtype), row.size);
    EXPECT_EQ(name_of(row.dtype), row.name);
  }
}

TEST(DType, ArraysConvertFromUnalignedMemory) {
  const float values[] = {1.5f, -2.0f, 0.0f, 65504.0f};
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    alignas(8) char encoded[16];
    from_float(values, encoded, dtype, 4);
    char shifted[17];
    std::memcpy(shifted + 1, encoded, 16);
    float decoded[4];
    to_float(shifted + 1, dtype, decoded, 4);
    EXPECT_EQ(decoded[0], 1.5f) << name_of(dtype);
    EXPECT_EQ(decoded[1], -2.0f) << name_of(dtype);
    EXPECT_EQ(decoded[2], 0.0f) << name_of(dtype);
    EXPECT_EQ(decoded[3], dtype == DType::bf16 ? 65536.0f : 65504.0f) << name_of(dtype);
  }
}

TEST(DType, DoublesConvertToFloat) {
  const double values[] = {0.1, -1e300};
  float decoded[2];
  to_float(values, DType::f64, decoded, 2);
  EXPECT_EQ(decoded[0], 0.1f);
  EXPECT_EQ(decoded[1], -std::numeric_limits<float>::infinity());
}

TEST(DType, IntegersDoNotConvert) {
  float value = 0;
  int32_t integer = 0;
  EXPECT_THROW(to_float(&integer, DType::i32, &value, 1), Error);
  EXPECT_THROW(from_float(&value, &integer, DType::i32, 1), Error);
}

}  // namespace
}  // namespace mamba3
