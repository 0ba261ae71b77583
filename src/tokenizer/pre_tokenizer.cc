#include "tokenizer/pre_tokenizer.h"

#include <string>

#include "tokenizer/unicode.h"

namespace mamba3 {

namespace {

// A stretch of a piece: a delimiter, or what lies between two.
struct Part {
  size_t begin = 0, end = 0;
  bool delimiter = false;
};

bool join(SplitBehavior behavior, const Part& left, const Part& right) {
  switch (behavior) {
    case SplitBehavior::isolated:
    case SplitBehavior::removed:
      return false;
    case SplitBehavior::contiguous:
      return left.delimiter == right.delimiter;
    case SplitBehavior::merged_with_previous:
      return right.delimiter && !left.delimiter;
    case SplitBehavior::merged_with_next:
      return left.delimiter && !right.delimiter;
  }
  return false;
}

template <typename EmitPart>
void for_each_part(const Regex& regex, bool invert, std::string_view text, const EmitPart& emit) {
  Regex::Search search(regex, text);
  size_t end = 0;
  while (const auto match = search.next()) {
    if (match->begin > end) emit(Part{end, match->begin, invert});
    emit(Part{match->begin, match->end, !invert});
    end = match->end;
  }
  if (end < text.size()) emit(Part{end, text.size(), invert});
}

}  // namespace

void PreTokenizer::run(std::string_view text, const Emit& emit) const {
  std::string storage;
  apply(0, {text, text_for_matching(text, storage)}, emit);
}

void PreTokenizer::apply(size_t step, Piece piece, const Emit& emit) const {
  if (piece.text.empty()) return;
  if (step == steps_.size()) return emit(piece.text);
  const SplitStep& split = steps_[step];

  std::string text, matched;
  if (split.add_prefix_space && piece.text[0] != ' ') {
    text = " " + std::string(piece.text);
    matched = " " + std::string(piece.matched);
    piece = {text, matched};
  }
  if (!split.regex) return apply(step + 1, piece, emit);

  const auto pass_on = [&](const Part& part) {
    if (split.behavior == SplitBehavior::removed && part.delimiter) return;
    const size_t length = part.end - part.begin;
    apply(step + 1,
          {piece.text.substr(part.begin, length), piece.matched.substr(part.begin, length)}, emit);
  };
  std::optional<Part> waiting;  // may yet be joined with the next one
  for_each_part(*split.regex, split.invert, piece.matched, [&](const Part& part) {
    if (!waiting) {
      waiting = part;
    } else if (join(split.behavior, *waiting, part)) {
      waiting = Part{waiting->begin, part.end, part.delimiter};
    } else {
      pass_on(*waiting);
      waiting = part;
    }
  });
  if (waiting) pass_on(*waiting);
}

Regex gpt2_regex() {
  return Regex(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
}

}  // namespace mamba3
