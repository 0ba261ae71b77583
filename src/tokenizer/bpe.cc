#include "tokenizer/bpe.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "core/error.h"

namespace mamba3 {

namespace {

// Long words rarely come twice, and a text of very many different words must not fill the memory.
constexpr size_t kLongestKnownWord = 64;
constexpr size_t kMostKnownWords = size_t{1} << 20;

}  // namespace

Bpe::Bpe(Tables tables) : tables_(std::move(tables)) {
  auto& merges = tables_.merges;
  std::sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::tie(a.left, a.right, b.rank) < std::tie(b.left, b.right, a.rank);
  });
  const auto same_pair = [](const Merge& a, const Merge& b) {
    return a.left == b.left && a.right == b.right;
  };
  merges.erase(std::unique(merges.begin(), merges.end(), same_pair), merges.end());
  first_merge_.assign(static_cast<size_t>(tables_.vocab_size) + 1, 0);
  for (const Merge& merge : merges) ++first_merge_[static_cast<size_t>(merge.left) + 1];
  for (size_t id = 1; id < first_merge_.size(); ++id) first_merge_[id] += first_merge_[id - 1];
}

const Bpe::Merge* Bpe::find_merge(int32_t left, int32_t right) const {
  const Merge* begin = tables_.merges.data() + first_merge_[static_cast<size_t>(left)];
  const Merge* end = tables_.merges.data() + first_merge_[static_cast<size_t>(left) + 1];
  const Merge* found = std::lower_bound(
      begin, end, right, [](const Merge& merge, int32_t id) { return merge.right < id; });
  return found != end && found->right == right ? found : nullptr;
}

void Bpe::encode(std::string_view word, Workspace& workspace, std::vector<int32_t>& ids) const {
  if (word.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    input_error("the text has a word of {} bytes; the tokenizer takes at most 2^31 - 1",
                word.size());
  }
  std::string key(word);
  if (const auto known = workspace.known_words.find(key); known != workspace.known_words.end()) {
    const auto from =
        workspace.known_ids.begin() + static_cast<std::ptrdiff_t>(known->second.begin);
    ids.insert(ids.end(), from, from + static_cast<std::ptrdiff_t>(known->second.size));
    return;
  }
  const size_t begin = ids.size();
  if (const auto whole = tables_.whole_words.find(key); whole != tables_.whole_words.end()) {
    ids.push_back(whole->second);
  } else {
    split_into_bytes(word, workspace);
    merge(workspace);
    for (const auto& symbol : workspace.symbols) {
      if (symbol.alive) ids.push_back(symbol.id);
    }
  }
  if (word.size() > kLongestKnownWord || workspace.known_words.size() == kMostKnownWords) return;
  workspace.known_words.emplace(std::move(key),
                                Workspace::Range{workspace.known_ids.size(), ids.size() - begin});
  workspace.known_ids.insert(workspace.known_ids.end(),
                             ids.begin() + static_cast<std::ptrdiff_t>(begin), ids.end());
}

void Bpe::split_into_bytes(std::string_view word, Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  symbols.clear();
  bool after_unknown = false;
  for (const char byte : word) {
    const auto known = tables_.byte_ids[static_cast<uint8_t>(byte)];
    const auto id = known ? known : tables_.unknown;
    const bool fused = !known && after_unknown && tables_.fuse_unknown;
    after_unknown = !known;
    if (!id || fused) continue;
    const auto position = static_cast<int32_t>(symbols.size());
    if (position > 0) symbols.back().next = position;
    symbols.push_back({.id = *id, .previous = position - 1});
  }
}

void Bpe::push_candidate(int32_t position, Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  const auto& left = symbols[static_cast<size_t>(position)];
  if (left.next < 0) return;
  const Merge* merge = find_merge(left.id, symbols[static_cast<size_t>(left.next)].id);
  if (merge) workspace.candidates.push_back({position, merge});
}

void Bpe::merge(Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  auto& heap = workspace.candidates;
  // The candidate on top has the lowest rank, and among those the first position.
  const auto later = [](const Workspace::Candidate& a, const Workspace::Candidate& b) {
    return std::tie(a.merge->rank, a.position) > std::tie(b.merge->rank, b.position);
  };
  const auto push = [&](int32_t position) {
    const size_t before = heap.size();
    push_candidate(position, workspace);
    if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), later);
  };

  heap.clear();
  for (size_t i = 0; i < symbols.size(); ++i) push_candidate(static_cast<int32_t>(i), workspace);
  std::make_heap(heap.begin(), heap.end(), later);

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), later);
    const auto [position, rule] = heap.back();
    heap.pop_back();
    auto& left = symbols[static_cast<size_t>(position)];
    if (!left.alive || left.id != rule->left || left.next < 0) continue;
    auto& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != rule->right) continue;  // an earlier merge took one of the two

    left.id = rule->merged;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = position;
    if (left.previous >= 0) push(left.previous);
    push(position);
  }
}

}  // namespace mamba3
