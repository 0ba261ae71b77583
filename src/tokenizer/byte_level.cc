#include "tokenizer/byte_level.h"

#include <array>
#include <cstdint>

#include "tokenizer/utf8.h"

namespace mamba3 {

namespace {

constexpr char32_t kFirstSubstitute = 0x100;
constexpr size_t kSubstitutes = 68;  // bytes that do not print

constexpr bool prints(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

struct Alphabet {
  std::array<char32_t, 256> character{};
  std::array<uint8_t, kFirstSubstitute + kSubstitutes> byte{};

  constexpr Alphabet() {
    char32_t substitute = kFirstSubstitute;
    for (size_t b = 0; b < 256; ++b) {
      character[b] = prints(static_cast<int>(b)) ? static_cast<char32_t>(b) : substitute++;
      byte[character[b]] = static_cast<uint8_t>(b);
    }
  }
  constexpr bool has(char32_t c) const { return c < byte.size() && character[byte[c]] == c; }
};

constexpr Alphabet kAlphabet;

}  // namespace

std::string byte_level_spelling(std::string_view bytes) {
  std::string spelling;
  spelling.reserve(2 * bytes.size());
  for (const char byte : bytes) {
    append_utf8(spelling, kAlphabet.character[static_cast<uint8_t>(byte)]);
  }
  return spelling;
}

std::optional<std::string> byte_level_bytes(std::string_view spelling) {
  std::string bytes;
  for (size_t at = 0; at < spelling.size();) {
    const Utf8Unit unit = utf8_at(spelling, at);
    if (!unit.valid || !kAlphabet.has(unit.code_point)) return std::nullopt;
    bytes.push_back(static_cast<char>(kAlphabet.byte[unit.code_point]));
    at += static_cast<size_t>(unit.length);
  }
  return bytes;
}

}  // namespace mamba3
