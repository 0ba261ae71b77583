#pragma once

#include <utility>

#include "cuda/grid.h"
#include "cuda/runtime.h"

namespace mamba3::cuda {

// Launches a kernel of the op on the context's stream. Every launch of ours goes through here or
// launch_overlapping(), so that none is unchecked; a grid without blocks is no launch.
template <typename... Params, typename... Args>
void launch(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
            Args&&... args) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), grid.shared_bytes, op);
  record_begin(ctx, op);
  kernel<<<grid.blocks, grid.threads, grid.shared_bytes, stream_of(ctx)>>>(
      static_cast<Params>(args)...);
  check(cudaGetLastError(), op);
  record_end(ctx);
}

template <int = 0>
__global__ void code_probe() {}

// Whether the GPU and the code for it have clusters and overlapping kernels, cuda/overlap.cuh. The
// code may be of an older architecture than the GPU.
inline bool can_overlap() {
  static const bool can = [] {
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, code_probe<>), "asking for a kernel's architecture");
    return code.ptxVersion >= 90;
  }();
  return can;
}

// launch() of a kernel that begins while the one before it ends, if can_overlap(); it has to wait
// as cuda/overlap.cuh says. `cluster` blocks along x form a cluster; more than one asks for
// can_overlap().
template <typename... Params, typename... Args>
void launch_overlapping(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
                        unsigned cluster, Args&&... args) {
  const bool overlap = can_overlap();
  if (!overlap && cluster == 1) return launch(ctx, op, kernel, grid, std::forward<Args>(args)...);
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  allow_shared_memory(reinterpret_cast<const void*>(kernel), grid.shared_bytes, op);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = overlap ? 1 : 0;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  record_begin(ctx, op);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), op);
  record_end(ctx);
}

}  // namespace mamba3::cuda
