#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace mamba3 {

// The alphabet in which byte-level tokenizers spell their tokens, so that a vocabulary is printable
// text: 256 characters, one a byte. Printable bytes of Latin-1 are themselves; the others are, in
// order, U+0100, U+0101, ... (a space is U+0120, a newline U+010A).

std::string byte_level_spelling(std::string_view bytes);

// The bytes that a spelling stands for; nothing if it has a character outside the alphabet.
std::optional<std::string> byte_level_bytes(std::string_view spelling);

}  // namespace mamba3
