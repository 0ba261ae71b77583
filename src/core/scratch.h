#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/view.h"

namespace mamba3 {

// Temporary memory of ops: a stack of aligned pieces. The first run of a new shape may allocate;
// what a scope added is merged when it ends, and once everything is released there is one block as
// large as the most ever in use, so every later run of the same shapes allocates nothing (what CUDA
// graph capture and steady latency need).
class Scratch {
 public:
  explicit Scratch(Device device = Device::cpu) : device_(device) {}

  // n uninitialised elements in the device's memory, aligned to 256 bytes, valid until the
  // enclosing ScratchScope ends.
  template <typename T>
  std::span<T> take(int64_t n) {
    return {static_cast<T*>(take_bytes(static_cast<size_t>(n) * sizeof(T))),
            static_cast<size_t>(n)};
  }

  size_t capacity() const;                              // bytes owned now
  int64_t allocations() const { return allocations_; }  // blocks ever allocated

 private:
  friend class ScratchScope;
  struct Block {
    std::shared_ptr<void> memory;
    size_t size = 0;
    size_t used = 0;
  };
  void* take_bytes(size_t bytes);
  void add_block(size_t bytes);
  void merge(size_t first);  // block and all after it, which are empty

  Device device_;
  std::vector<Block> blocks_;
  size_t in_use_ = 0, most_in_use_ = 0;  // bytes
  int64_t allocations_ = 0;
};

// Gives back, when it ends, all that was taken since it began.
class ScratchScope {
 public:
  explicit ScratchScope(Scratch& scratch);
  ~ScratchScope();
  ScratchScope(const ScratchScope&) = delete;
  ScratchScope& operator=(const ScratchScope&) = delete;

  template <typename T>
  std::span<T> take(int64_t n) {
    return scratch_.take<T>(n);
  }

 private:
  Scratch& scratch_;
  size_t block_;
  size_t used_;
  size_t in_use_;
};

}  // namespace mamba3
