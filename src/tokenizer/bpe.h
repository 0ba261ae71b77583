#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mamba3 {

// Byte pair encoding of a word: starts with one token a byte and, as long as it can, merges the
// neighbours whose merge has the lowest rank, the leftmost first.
class Bpe {
 public:
  struct Merge {
    int32_t left = 0, right = 0, merged = 0;
    int32_t rank = 0;
  };
  struct Tables {
    std::array<std::optional<int32_t>, 256> byte_ids;  // the token of each byte, if it has one
    std::vector<Merge> merges;                         // of one pair the last rank counts
    int64_t vocab_size = 0;                            // every id is below this
    std::optional<int32_t> unknown;  // the token of bytes without one, which else are dropped
    bool fuse_unknown = false;       // one for a run of such bytes
    // Words that are tokens whatever the merges make of them (ignore_merges).
    std::unordered_map<std::string, int32_t> whole_words;
  };
  explicit Bpe(Tables tables);

  // What one thread needs while it encodes: memory of the words that it met, and scratch.
  class Workspace;

  // Appends the ids of `word`, which takes n log n time in its length.
  void encode(std::string_view word, Workspace& workspace, std::vector<int32_t>& ids) const;

 private:
  void split_into_bytes(std::string_view word, Workspace& workspace) const;
  void merge(Workspace& workspace) const;
  void push_candidate(int32_t position, Workspace& workspace) const;
  const Merge* find_merge(int32_t left, int32_t right) const;

  Tables tables_;
  std::vector<int32_t> first_merge_;  // of each left token, in merges sorted by (left, right)
};

class Bpe::Workspace {
 private:
  friend class Bpe;
  struct Symbol {
    int32_t id = 0;
    int32_t previous = -1, next = -1;  // -1: none
    bool alive = true;
  };
  struct Candidate {
    int32_t position;
    const Merge* merge;
  };
  struct Range {
    size_t begin, size;
  };

  std::vector<Symbol> symbols;
  std::vector<Candidate> candidates;  // a heap
  std::vector<int32_t> known_ids;
  std::unordered_map<std::string, Range> known_words;  // into known_ids
};

}  // namespace mamba3
