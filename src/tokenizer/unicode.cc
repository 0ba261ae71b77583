#include "tokenizer/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "tokenizer/utf8.h"

namespace mamba3 {

namespace {

struct StandIn {
  char32_t first, last;  // the code points that are replaced
  char32_t stand_in;     // of the same length in UTF-8
};
struct Range {
  char32_t first, last;
};

#include "tokenizer/unicode_tables.inc"

constexpr char kNotText = '\x01';
// No character below it changes under NFC or combines with one before it.
constexpr char32_t kFirstCombining = 0x300;

template <typename R>
const R* find(std::span<const R> ranges, char32_t code_point) {
  const auto after = std::upper_bound(ranges.begin(), ranges.end(), code_point,
                                      [](char32_t c, const R& range) { return c < range.first; });
  if (after == ranges.begin()) return nullptr;
  const R& range = *(after - 1);
  return code_point <= range.last ? &range : nullptr;
}

size_t ascii_run(std::string_view text, size_t at) {
  const size_t begin = at;
  while (at < text.size() && static_cast<uint8_t>(text[at]) < 0x80) ++at;
  return at - begin;
}

// Composes one text that holds no inert character. Decomposition is done here rather than by
// utf8proc_map(), which sorts combining marks in quadratic time.
class Composer {
 public:
  void add(char32_t code_point) {
    constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE);
    std::array<utf8proc_int32_t, 8> parts;  // canonical decompositions have at most 4
    const auto count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code_point), parts.data(),
                                static_cast<utf8proc_ssize_t>(parts.size()), kOptions, nullptr);
    buffer_.insert(buffer_.end(), parts.begin(), parts.begin() + count);
  }

  void finish(std::string& out) {
    if (buffer_.empty()) return;
    sort_marks();
    constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);
    const auto length = utf8proc_normalize_utf32(
        buffer_.data(), static_cast<utf8proc_ssize_t>(buffer_.size()), kOptions);
    for (utf8proc_ssize_t i = 0; i < length; ++i) {
      append_utf8(out, static_cast<char32_t>(buffer_[static_cast<size_t>(i)]));
    }
    buffer_.clear();
  }

 private:
  static int combining_class(utf8proc_int32_t code_point) {
    return utf8proc_get_property(code_point)->combining_class;
  }

  void sort_marks() {
    const auto is_mark = [](utf8proc_int32_t c) { return combining_class(c) != 0; };
    for (auto at = buffer_.begin(); at != buffer_.end();) {
      const auto begin = std::find_if(at, buffer_.end(), is_mark);
      at = std::find_if_not(begin, buffer_.end(), is_mark);
      std::stable_sort(begin, at, [](utf8proc_int32_t a, utf8proc_int32_t b) {
        return combining_class(a) < combining_class(b);
      });
    }
  }

  std::vector<utf8proc_int32_t> buffer_;
};

}  // namespace

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word_character(char32_t c) {
  const StandIn* range = find<StandIn>(kStandIns, c);
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(range ? range->stand_in : c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      break;
  }
  const bool is_joiner = c == 0x200C || c == 0x200D;
  const bool is_enclosed_letter = (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
                                  (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
  return is_joiner || is_enclosed_letter;
}

std::string nfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  Composer composer;
  for (size_t at = 0; at < text.size();) {
    // All but the last character of a run of ASCII combines with nothing.
    if (const size_t run = ascii_run(text, at); run > 1) {
      composer.finish(out);
      out.append(text, at, run - 1);
      at += run - 1;
    }
    const Utf8Unit unit = utf8_at(text, at);
    const bool inert = !unit.valid || find<Range>(kInertInNfc, unit.code_point);
    if (inert || unit.code_point < kFirstCombining) composer.finish(out);
    if (inert) {
      out.append(text, at, static_cast<size_t>(unit.length));
    } else {
      composer.add(unit.code_point);
    }
    at += static_cast<size_t>(unit.length);
  }
  composer.finish(out);
  return out;
}

std::string_view text_for_matching(std::string_view text, std::string& storage) {
  storage.clear();
  size_t copied = 0;  // text[0, copied) is in storage
  const auto replace = [&](size_t at, int length, std::string_view by) {
    storage.append(text, copied, at - copied);
    storage.append(by);
    copied = at + static_cast<size_t>(length);
  };
  for (size_t at = ascii_run(text, 0); at < text.size(); at += ascii_run(text, at)) {
    const Utf8Unit unit = utf8_at(text, at);
    if (!unit.valid) {
      replace(at, unit.length, std::string(static_cast<size_t>(unit.length), kNotText));
    } else if (const StandIn* range = find<StandIn>(kStandIns, unit.code_point)) {
      std::string by;
      append_utf8(by, range->stand_in);
      replace(at, unit.length, by);
    }
    at += static_cast<size_t>(unit.length);
  }
  if (copied == 0) return text;
  storage.append(text, copied, text.size() - copied);
  return storage;
}

}  // namespace mamba3
