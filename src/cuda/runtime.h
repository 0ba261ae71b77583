#pragma once

// The host side of the CUDA runtime: streams and checks. Neither this nor any .cu file includes
// core/error.h, because nvcc cannot compile the formatting library behind it.

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "core/context.h"

namespace mamba3::cuda {

class Cublas;    // cuda/cublas.h
class Recorder;  // cuda/timing.h

// What a context owns on the GPU.
struct Stream {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  std::shared_ptr<Cublas> cublas;      // made by the first product
  size_t shared_memory = 0;            // bytes that a block may have, after asking
  std::shared_ptr<Recorder> recorder;  // while a profile is taken

  Stream() = default;
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
};

// Throws Error with what CUDA says. `what` is what was tried: "allocating 3 GB".
void check(cudaError_t status, const char* what);

// Lets a kernel have so many bytes of dynamic shared memory, or as many as it was ever let have: a
// launch that is being recorded, or that another thread makes, may need more than this one.
void allow_shared_memory(const void* kernel, size_t bytes, const char* op);

inline cudaStream_t stream_of(const Context& ctx) {
  return ctx.stream->stream;
}

// Before and after all that is given to the stream for an op: for the profile, if one is taken.
void record_begin(Context& ctx, const char* op);
void record_end(Context& ctx);

// For switches over dtypes: throws Error.
[[noreturn]] void unsupported(const char* what, DType dtype);

}  // namespace mamba3::cuda
