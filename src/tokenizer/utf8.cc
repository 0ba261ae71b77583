#include "tokenizer/utf8.h"

#include <cstdint>

namespace mamba3 {

namespace {

constexpr char32_t kReplacement = 0xFFFD;

// The Unicode standard's table of well-formed sequences (3-7), as bounds of the second byte and a
// length; later bytes lie in 80..BF.
struct Lead {
  int length = 0;  // 0: no sequence starts with this byte
  uint8_t low = 0x80, high = 0xBF;
};

Lead lead_of(uint8_t byte) {
  if (byte < 0xC2) return {};
  if (byte < 0xE0) return {.length = 2};
  if (byte == 0xE0) return {.length = 3, .low = 0xA0};
  if (byte == 0xED) return {.length = 3, .high = 0x9F};  // no surrogates
  if (byte < 0xF0) return {.length = 3};
  if (byte == 0xF0) return {.length = 4, .low = 0x90};
  if (byte < 0xF4) return {.length = 4};
  if (byte == 0xF4) return {.length = 4, .high = 0x8F};  // no code point above 10FFFF
  return {};
}

}  // namespace

Utf8Unit utf8_at(std::string_view bytes, size_t position) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t first = byte(position);
  if (first < 0x80) return {.code_point = first, .length = 1, .valid = true};
  const Lead lead = lead_of(first);
  if (lead.length == 0) return {.length = 1};
  char32_t code_point = first & (0x7F >> lead.length);
  for (int i = 1; i < lead.length; ++i) {
    const size_t at = position + static_cast<size_t>(i);
    if (at == bytes.size()) return {.length = i, .incomplete = true};
    const uint8_t low = i == 1 ? lead.low : 0x80;
    const uint8_t high = i == 1 ? lead.high : 0xBF;
    if (byte(at) < low || byte(at) > high) return {.length = i};
    code_point = (code_point << 6) | (byte(at) & 0x3F);
  }
  return {.code_point = code_point, .length = lead.length, .valid = true};
}

void append_utf8(std::string& text, char32_t code_point) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

std::optional<size_t> first_invalid_utf8(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Unit unit = utf8_at(bytes, at);
    if (!unit.valid) return at;
    at += static_cast<size_t>(unit.length);
  }
  return std::nullopt;
}

std::string take_valid_utf8(std::string& bytes) {
  std::string text;
  size_t at = 0;
  while (at < bytes.size()) {
    const Utf8Unit unit = utf8_at(bytes, at);
    if (unit.incomplete) break;
    if (unit.valid) {
      text.append(bytes, at, static_cast<size_t>(unit.length));
    } else {
      append_utf8(text, kReplacement);
    }
    at += static_cast<size_t>(unit.length);
  }
  bytes.erase(0, at);
  return text;
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string rest(bytes);
  std::string text = take_valid_utf8(rest);
  if (!rest.empty()) append_utf8(text, kReplacement);
  return text;
}

}  // namespace mamba3
