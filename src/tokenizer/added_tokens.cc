#include "tokenizer/added_tokens.h"

#include <algorithm>

#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"

namespace mamba3 {

namespace {

uint64_t edge(uint32_t node, char byte) {
  return (static_cast<uint64_t>(node) << 8) | static_cast<uint8_t>(byte);
}

// The position where the character that ends before `end` begins. `end` is not 0.
size_t character_before(std::string_view text, size_t end) {
  size_t at = end - 1;
  while (at > 0 && end - at < 4 && (static_cast<uint8_t>(text[at]) & 0xC0) == 0x80) --at;
  const Utf8Unit unit = utf8_at(text, at);
  return unit.valid && at + static_cast<size_t>(unit.length) == end ? at : end - 1;
}

bool word_character_at(std::string_view text, size_t at) {
  const Utf8Unit unit = utf8_at(text, at);
  return unit.valid && is_word_character(unit.code_point);
}

bool white_space_at(std::string_view text, size_t at) {
  const Utf8Unit unit = utf8_at(text, at);
  return unit.valid && is_white_space(unit.code_point);
}

size_t skip_white_space(std::string_view text, size_t at) {
  while (at < text.size() && white_space_at(text, at)) {
    at += static_cast<size_t>(utf8_at(text, at).length);
  }
  return at;
}

// Goes back no further than `first`.
size_t skip_white_space_before(std::string_view text, size_t at, size_t first) {
  while (at > first && white_space_at(text, character_before(text, at))) {
    at = character_before(text, at);
  }
  return at;
}

bool touches_word(std::string_view text, size_t begin, size_t end) {
  return (begin > 0 && word_character_at(text, character_before(text, begin))) ||
         (end < text.size() && word_character_at(text, end));
}

}  // namespace

AddedTokenMatcher::AddedTokenMatcher(std::vector<AddedToken> tokens)
    : token_of_node_{-1}, tokens_(std::move(tokens)) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    uint32_t node = 0;
    for (const char byte : tokens_[i].content) {
      const auto fresh = static_cast<uint32_t>(token_of_node_.size());
      const auto [child, is_new] = children_.try_emplace(edge(node, byte), fresh);
      if (is_new) token_of_node_.push_back(-1);
      node = child->second;
    }
    token_of_node_[node] = static_cast<int32_t>(i);
  }
  for (size_t byte = 0; byte < starts_.size(); ++byte) {
    starts_[byte] = children_.contains(edge(0, static_cast<char>(byte)));
  }
}

AddedTokenMatcher::Hit AddedTokenMatcher::longest_at(std::string_view text, size_t position) const {
  Hit hit;
  uint32_t node = 0;
  for (size_t at = position; at < text.size(); ++at) {
    const auto child = children_.find(edge(node, text[at]));
    if (child == children_.end()) break;
    node = child->second;
    const int32_t token = token_of_node_[node];
    if (token >= 0) hit = {at + 1 - position, &tokens_[static_cast<size_t>(token)]};
  }
  return hit;
}

void AddedTokenMatcher::split(std::string_view text,
                              const std::function<void(std::string_view)>& on_text,
                              const std::function<void(int32_t)>& on_token) const {
  size_t done = 0;         // text before it has been passed on
  size_t stripped_to = 0;  // between a token and this position there is white space only
  for (size_t at = 0; at < text.size();) {
    const Hit hit = starts_[static_cast<uint8_t>(text[at])] ? longest_at(text, at) : Hit{};
    if (!hit.token) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + hit.length;
    at = end;  // whatever the flags make of the hit, the search goes on behind it
    if (hit.token->single_word && touches_word(text, begin, end)) continue;
    if (hit.token->lstrip) begin = skip_white_space_before(text, begin, done);
    if (hit.token->rstrip) end = stripped_to = skip_white_space(text, std::max(end, stripped_to));
    if (done < begin) on_text(text.substr(done, begin - done));
    on_token(hit.token->id);
    // A hit in white space that the token before it has taken counts all the same, as it does in
    // the reference.
    done = end;
  }
  if (done < text.size()) on_text(text.substr(done));
}

}  // namespace mamba3
