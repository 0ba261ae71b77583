#pragma once

#include <string>
#include <string_view>

namespace mamba3 {

// The Unicode questions that a tokenizer asks, answered as the `tokenizers` package answers them.
// Its regular expressions know Unicode 16 and its normaliser Unicode 9, whatever versions PCRE2 and
// utf8proc know here; unicode_tables.inc lists the differences.

bool is_white_space(char32_t code_point);

// Letters, marks, digits, connectors and joiners: the \w of regular expressions.
bool is_word_character(char32_t code_point);

// Normalization form C. Bytes that are not UTF-8 stay as they are and join with nothing.
std::string nfc(std::string_view text);

// A text that a regular expression matches in place of `text`, byte for byte at the same positions:
// every character that PCRE2 may classify differently is replaced by one of the right general
// category, and every byte that is not UTF-8 by a control character. It lies in `storage` if it
// differs from `text`.
std::string_view text_for_matching(std::string_view text, std::string& storage);

}  // namespace mamba3
