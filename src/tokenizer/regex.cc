#include "tokenizer/regex.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>

#include "core/error.h"
#include "tokenizer/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace mamba3 {

namespace {

// Walks through a pattern and throws at the first construct that Oniguruma and PCRE2 read
// differently, or that we do not know to be read alike.
class PatternCheck {
 public:
  explicit PatternCheck(std::string_view pattern) : pattern_(pattern) {}

  void run() {
    bool in_class = false;
    while (at_ < pattern_.size()) {
      if (starts_with("\\")) {
        escape();
      } else if (in_class) {
        if (starts_with("[") || starts_with("&&")) refuse(starts_with("[") ? 1 : 2);
        in_class = !starts_with("]");
        ++at_;
      } else if (starts_with("[")) {
        in_class = true;
        // A bracket here is a literal, or an error, depending on the syntax.
        at_ += starts_with("[^") ? 2 : 1;
        if (starts_with("]")) refuse(1);
      } else if (starts_with("(?") || starts_with("(*")) {
        group();
      } else if (starts_with("{")) {
        repetition();
      } else {
        ++at_;
      }
    }
  }

 private:
  bool starts_with(std::string_view text) const {
    return pattern_.substr(at_).substr(0, text.size()) == text;
  }

  [[noreturn]] void refuse(size_t length) const {
    input_error(
        "the regular expression \"{}\" uses {}, which is not supported; supported are character "
        "classes, repetitions, (?:...), (?i:...), lookaround, and escapes: general categories "
        "(\\p{{L}}), \\s, \\d, \\r, \\n, \\t, punctuation",
        pattern_, pattern_.substr(at_, length));
  }

  void escape() {
    const char kind = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    if (kind == 'p' || kind == 'P') {
      const size_t close = pattern_.find('}', at_);
      const std::string_view name = pattern_.substr(at_ + 2, close - at_ - 2);
      if (close == pattern_.npos || !is_category(name)) refuse(name.size() + 3);
      at_ = close + 1;
    } else if (std::string_view("sSdDrntfae").find(kind) != std::string_view::npos ||
               (std::ispunct(static_cast<unsigned char>(kind)) && kind != '<' && kind != '>')) {
      at_ += 2;
    } else {
      refuse(2);
    }
  }

  // "{L" or "{Lu", perhaps negated: "{^L".
  static bool is_category(std::string_view name) {
    if (name.empty() || name[0] != '{') return false;
    name.remove_prefix(1);
    if (!name.empty() && name[0] == '^') name.remove_prefix(1);
    constexpr std::array kCategories = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc",
                                        "Me", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
                                        "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So",
                                        "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co", "Cn"};
    return std::find(kCategories.begin(), kCategories.end(), name) != kCategories.end();
  }

  void group() {
    constexpr std::array kKnown = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:", "(?-i:"};
    for (const std::string_view known : kKnown) {
      if (starts_with(known)) {
        at_ += known.size();
        return;
      }
    }
    refuse(3);
  }

  // {n}, {n,} and {n,m}; a ? or + behind them means something else in Ruby.
  void repetition() {
    const size_t close = pattern_.find('}', at_);
    const std::string_view counts = pattern_.substr(at_ + 1, close - at_ - 1);
    const bool known = close != pattern_.npos && !counts.empty() && counts[0] != ',' &&
                       counts.find_first_not_of("0123456789,") == counts.npos;
    if (!known) refuse(1);
    const char behind = close + 1 < pattern_.size() ? pattern_[close + 1] : '\0';
    if (behind == '?' || behind == '+') refuse(close - at_ + 2);
    at_ = close + 1;
  }

  std::string_view pattern_;
  size_t at_ = 0;
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> message{};
  pcre2_get_error_message(code, message.data(), message.size());
  return reinterpret_cast<const char*>(message.data());
}

// Steps that one match may take: the default, and more for texts in which even a linear scan takes
// more.
uint32_t match_limit(size_t length) {
  return static_cast<uint32_t>(
      std::min<uint64_t>(UINT32_MAX, 10'000'000 + 16 * static_cast<uint64_t>(length)));
}

template <auto kFree>
struct Free {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};

}  // namespace

struct Regex::Code {
  std::unique_ptr<pcre2_code, Free<pcre2_code_free>> code;
};

Regex::Regex(const std::string& pattern) {
  PatternCheck(pattern).run();
  int code = 0;
  PCRE2_SIZE at = 0;
  // Ruby's ^ and $ know lines.
  pcre2_code* compiled = pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C, &code, &at, nullptr);
  if (!compiled) {
    input_error("the regular expression \"{}\" is malformed at position {}: {}", pattern, at,
                pcre2_message(code));
  }
  auto owner = std::make_shared<Code>();
  owner->code.reset(compiled);
  code_ = std::move(owner);
  // Without a compiler for this machine, matching falls back to the slower interpreter.
  pcre2_jit_compile(compiled, PCRE2_JIT_COMPLETE);
}

struct Regex::Search::State {
  const pcre2_code* code;
  std::string_view text;
  std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>> data;
  std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>> context;
  size_t from = 0;
  std::optional<size_t> last_end;

  bool find() {
    const int found = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                  from, PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (found < 0 && found != PCRE2_ERROR_NOMATCH) {
      error("a regular expression of the tokenizer fails on a text of {} bytes: {}", text.size(),
            pcre2_message(found));
    }
    return found >= 0;
  }
};

Regex::Search::Search(const Regex& regex, std::string_view text)
    : state_(std::make_unique<State>()) {
  state_->code = regex.code_->code.get();
  state_->text = text;
  state_->data.reset(pcre2_match_data_create_from_pattern(state_->code, nullptr));
  state_->context.reset(pcre2_match_context_create(nullptr));
  if (!state_->data || !state_->context) throw std::bad_alloc();
  pcre2_set_match_limit(state_->context.get(), match_limit(text.size()));
}

Regex::Search::~Search() = default;

std::optional<Regex::Match> Regex::Search::next() {
  State& s = *state_;
  while (s.from <= s.text.size() && s.find()) {
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(s.data.get());
    const Match match = {ends[0], ends[1]};
    const bool repeats = match.begin == match.end && s.last_end == match.end;
    if (!repeats) {
      s.from = match.end;
      s.last_end = match.end;
      return match;
    }
    s.from += s.from < s.text.size() ? static_cast<size_t>(utf8_at(s.text, s.from).length) : 1;
  }
  return std::nullopt;
}

}  // namespace mamba3
