#pragma once

#include "cuda/runtime.h"

namespace mamba3::cuda {

// What a launch is made of besides the kernel's arguments.
struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;  // dynamic
};

// Launches a kernel of the op on the context's stream. Every launch of ours goes through here, so
// that none is unchecked; a grid without blocks is no launch.
template <typename... Params, typename... Args>
void launch(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
            Args&&... args) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  if (grid.shared_bytes > 48 * 1024) {  // the limit without asking
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          op);
  }
  record_begin(ctx, op);
  kernel<<<grid.blocks, grid.threads, grid.shared_bytes, stream_of(ctx)>>>(
      static_cast<Params>(args)...);
  check(cudaGetLastError(), op);
  record_end(ctx);
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace mamba3::cuda
