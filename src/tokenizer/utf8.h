#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace mamba3 {

// What begins at a position of some bytes.
struct Utf8Unit {
  char32_t code_point = 0;  // of a character; meaningless otherwise
  int length = 0;           // bytes of the character, or of the ill-formed sequence
  bool valid = false;
  bool incomplete = false;  // ill-formed only because the bytes end too soon
};

// The character, or the ill-formed sequence, at bytes[position], which exists. An ill-formed
// sequence is as long as Unicode recommends for replacement ("maximal subpart"), so that each
// becomes one U+FFFD.
Utf8Unit utf8_at(std::string_view bytes, size_t position);

void append_utf8(std::string& text, char32_t code_point);

// The position of the first ill-formed sequence, if there is one.
std::optional<size_t> first_invalid_utf8(std::string_view bytes);

// Moves all of `bytes` except the beginning of a character at its end into the result, with U+FFFD
// for every ill-formed sequence.
std::string take_valid_utf8(std::string& bytes);

// `bytes` with U+FFFD for every ill-formed sequence.
std::string to_valid_utf8(std::string_view bytes);

}  // namespace mamba3
