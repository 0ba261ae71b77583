#include "core/scratch.h"

#include <algorithm>

#include "core/memory.h"

namespace mamba3 {

namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kSmallestBlock = size_t{1} << 20;

size_t round_up(size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

size_t Scratch::capacity() const {
  size_t bytes = 0;
  for (const Block& block : blocks_) bytes += block.size;
  return bytes;
}

void Scratch::add_block(size_t bytes) {
  Block block;
  block.size = round_up(std::max(bytes, kSmallestBlock));
  block.memory = allocate_bytes(device_, block.size);
  blocks_.push_back(std::move(block));
  ++allocations_;
}

void* Scratch::take_bytes(size_t bytes) {
  bytes = round_up(std::max(bytes, size_t{1}));
  if (blocks_.empty() || blocks_.back().used + bytes > blocks_.back().size) add_block(bytes);
  Block& block = blocks_.back();
  void* memory = static_cast<std::byte*>(block.memory.get()) + block.used;
  block.used += bytes;
  in_use_ += bytes;
  most_in_use_ = std::max(most_in_use_, in_use_);
  return memory;
}

void Scratch::merge(size_t first) {
  // All of it may have been in use at once, but no more than ever was.
  size_t bytes = 0;
  for (size_t i = first; i < blocks_.size(); ++i) bytes += blocks_[i].size;
  if (first == 0) bytes = most_in_use_;
  blocks_.resize(first);
  add_block(bytes);
}

ScratchScope::ScratchScope(Scratch& scratch)
    : scratch_(scratch),
      block_(scratch.blocks_.size()),
      used_(scratch.blocks_.empty() ? 0 : scratch.blocks_.back().used),
      in_use_(scratch.in_use_) {}

ScratchScope::~ScratchScope() {
  auto& blocks = scratch_.blocks_;
  scratch_.in_use_ = in_use_;
  for (size_t i = block_; i < blocks.size(); ++i) blocks[i].used = 0;
  if (block_ > 0) blocks[block_ - 1].used = used_;
  const bool outermost =
      std::all_of(blocks.begin(), blocks.end(), [](const auto& block) { return block.used == 0; });
  // Blocks that hold pieces of an outer scope stay as they are.
  const size_t first = outermost ? 0 : block_;
  if (blocks.size() > first + 1) scratch_.merge(first);
}

}  // namespace mamba3
