#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mamba3 {

// A token that is recognised in the text as it stands, before anything is cut into words.
struct AddedToken {
  std::string content;  // as it is looked for
  int32_t id = 0;
  bool single_word = false;  // not where a word character stands directly before or behind it
  bool lstrip = false;       // takes the white space before it with it
  bool rstrip = false;       // and that behind it
  bool normalized = true;    // is looked for in the normalized text
  bool special = false;      // does not stand for text
};

// Finds added tokens in a text: from left to right the longest that starts there, none overlapping.
class AddedTokenMatcher {
 public:
  // The contents are not empty, and no two are equal.
  explicit AddedTokenMatcher(std::vector<AddedToken> tokens);

  // Calls on_text(stretch) for the text between tokens, none empty, and on_token(id), in order.
  void split(std::string_view text, const std::function<void(std::string_view)>& on_text,
             const std::function<void(int32_t)>& on_token) const;

 private:
  struct Hit {
    size_t length = 0;  // 0: none
    const AddedToken* token = nullptr;
  };
  Hit longest_at(std::string_view text, size_t position) const;

  // A trie of the contents. Node 0 is the root; children_ maps (node, byte) to a node.
  std::unordered_map<uint64_t, uint32_t> children_;
  std::vector<int32_t> token_of_node_;  // index into tokens_, -1: none ends here
  std::array<bool, 256> starts_{};      // bytes with which a token starts
  std::vector<AddedToken> tokens_;
};

}  // namespace mamba3
