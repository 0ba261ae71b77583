#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <vector>

#include "tokenizer/regex.h"

namespace mamba3 {

// What becomes of the matches of a split's expression, which are its delimiters.
enum class SplitBehavior : uint8_t {
  isolated,              // each is a piece
  removed,               // they are dropped
  contiguous,            // a run of them is one piece
  merged_with_previous,  // each joins the text before it
  merged_with_next,      // each joins the text behind it
};

// One step of cutting text into the words that BPE merges in.
struct SplitStep {
  bool add_prefix_space = false;  // first puts a space before a piece that does not start with one
  std::optional<Regex> regex;     // then cuts it here; without an expression it stays whole
  SplitBehavior behavior = SplitBehavior::isolated;
  bool invert = false;  // the delimiters are what lies between the matches
};

class PreTokenizer {
 public:
  explicit PreTokenizer(std::vector<SplitStep> steps) : steps_(std::move(steps)) {}

  // Calls emit(word) for the words of `text`, in order, none empty.
  using Emit = std::function<void(std::string_view word)>;
  void run(std::string_view text, const Emit& emit) const;

 private:
  // A piece of text and of its stand-in for matching, of the same length.
  struct Piece {
    std::string_view text, matched;
  };
  void apply(size_t step, Piece piece, const Emit& emit) const;

  std::vector<SplitStep> steps_;
};

// The expression of ByteLevel's use_regex: contractions, words, numbers and other runs with the
// space before them, and white space that leaves its last character to the next word.
Regex gpt2_regex();

}  // namespace mamba3
