#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/context.h"
#include "core/view.h"

namespace mamba3 {

// Memory of a device, aligned to 256 bytes and not initialised. Throws Error that says how much was
// wanted and how much there is.
std::shared_ptr<void> allocate_bytes(Device device, size_t bytes);

// The same, every byte zero.
std::shared_ptr<void> allocate_zeros(Device device, size_t bytes);

// Copies a contiguous view to another of the same dtype and size, which may be on another device.
// Ordered with the ops of ctx. When one side is host memory, the copy is over when this returns.
void copy(Context& ctx, const View& from, const View& to);
// Sets every byte of a contiguous view on the context's device to zero.
void zero(Context& ctx, const View& view);
// Waits until everything asked of ctx is done. Errors of kernels show here.
void synchronize(Context& ctx);

namespace cuda {
bool available();  // whether there is a GPU
std::shared_ptr<void> allocate_bytes(size_t bytes);
// The most memory of the GPU that the process had at once, through allocate_bytes(), since the peak
// was last reset. 0 in a build without CUDA.
int64_t peak_bytes();
void reset_peak_bytes();
void copy_bytes(Context& ctx, const void* from, void* to, size_t bytes, bool wait);
void zero_bytes(Context& ctx, void* memory, size_t bytes);
void zero_new_bytes(void* memory, size_t bytes);
void synchronize(Context& ctx);
}  // namespace cuda

}  // namespace mamba3
