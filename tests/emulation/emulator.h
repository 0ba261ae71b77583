#pragma once

// A GPU of the host: runs the threads of a block as fibers, one at a time, and blocks one after the
// other. A thread goes on until it has to wait for others of its warp or block; whose turn it is
// then is drawn. So kernels are tested where there is no GPU, and with the host's tools.
//
// Shared memory is static memory of the program, whose addresses fit 32 bits as a GPU's do (the
// program is linked to fixed addresses). Dynamic shared memory is filled with NaN for every block.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace mamba3::emulation {

inline constexpr int kWarp = 32;
inline constexpr size_t kSharedBytes = 163 << 10;  // of a block, as on an A100
inline constexpr size_t kMostPosted = 64;          // bytes that a thread shows to its warp at once

// The thread that runs, and its block.
struct Position {
  uint3 thread, block;
  dim3 threads, blocks;
};
extern const Position* position;

// The dynamic shared memory of the block.
extern char dynamic_shared[kSharedBytes];

// Runs a kernel for all threads of a grid. Throws std::logic_error where threads wait for each
// other for ever, or the kernel wants what this GPU does not have.
void run(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

// Below, of a thread of a kernel: waits until all threads of the block, or of the warp, that have
// not ended are there.
void wait_for_block();
void wait_for_warp();
// How many threads of the block came to this wait with `yes`.
int count_in_block(bool yes);

int lane();

// Shows bytes to the threads of the warp; they can be read until the second post after this one.
void post_bytes(const void* bytes, size_t count);
template <typename T>
void post(const T& mine) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kMostPosted);
  post_bytes(&mine, sizeof(T));
}
// What the lane has posted, or null if it had ended.
const void* posted(int lane);

// Calls take(lane, value) for what every lane of the warp has posted.
template <typename T, typename Take>
void for_each_lane(const T& mine, Take&& take) {
  post(mine);
  for (int i = 0; i < kWarp; ++i) {
    const void* const bytes = posted(i);
    if (bytes == nullptr) continue;
    T value;
    std::memcpy(&value, bytes, sizeof value);
    take(i, value);
  }
}
template <typename T>
void exchange(const T& mine, T (&all)[kWarp]) {
  for_each_lane(mine, [&](int i, const T& value) { all[i] = value; });
}

}  // namespace mamba3::emulation
