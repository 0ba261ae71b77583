#include "core/dtype.h"

#include <cmath>
#include <cstring>

#include "core/error.h"

namespace mamba3 {

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i64:
    case DType::f64:
      return 8;
    case DType::u8:
      return 1;
  }
  return 0;
}

std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
    case DType::f64:
      return "f64";
    case DType::u8:
      return "u8";
  }
  return "?";
}

f16::f16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {  // NaN
    bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude >= 0x38800000u) {  // normal
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    bits = static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  } else {  // subnormal: the multiple of 2^-24 nearest to |value|
    const float steps = std::nearbyint(std::bit_cast<float>(magnitude) * 0x1p24f);
    bits = static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));
  }
}

f16::operator float() const {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

namespace {

template <typename T>
void convert_to_float(const void* source, float* out, int64_t n) {
  const char* bytes = static_cast<const char*>(source);
  for (int64_t i = 0; i < n; ++i) {
    T value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = static_cast<float>(value);
  }
}

}  // namespace

void to_float(const void* source, DType dtype, float* out, int64_t n) {
  switch (dtype) {
    case DType::f32:
      std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
      return;
    case DType::bf16:
      return convert_to_float<bf16>(source, out, n);
    case DType::f16:
      return convert_to_float<f16>(source, out, n);
    case DType::f64:
      return convert_to_float<double>(source, out, n);
    default:
      error("[to_float] no conversion from {} to f32", name_of(dtype));
  }
}

void from_float(const float* source, void* out, DType dtype, int64_t n) {
  switch (dtype) {
    case DType::f32:
      std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
      return;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<bf16*>(out)[i] = bf16(source[i]);
      return;
    case DType::f16:
      for (int64_t i = 0; i < n; ++i) static_cast<f16*>(out)[i] = f16(source[i]);
      return;
    default:
      error("[from_float] no conversion from f32 to {}", name_of(dtype));
  }
}

}  // namespace mamba3
