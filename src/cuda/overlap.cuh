#pragma once

// Kernels that begin while the kernel before them ends, which in a decode step of many short
// kernels hides most of the time to start one ("programmatic dependent launch", from compute
// capability 9.0 on); and kernels whose blocks form clusters.
//
// A kernel that is launched so calls wait_for_earlier_kernels() before it touches anything but
// weights and what the host alone writes, in every thread that touches it: several kernels before
// it may still run until then, since each of them let its next one start early.

#include "cuda/launch.cuh"

namespace mamba3::cuda {

// Whether launch_overlapping() overlaps; if not, it is launch().
inline constexpr bool kOverlap = false;

// Ends when the kernels before this one have, and shows what they wrote.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start once all blocks of this one have said so, or are over. It does not say
// that this kernel has written anything.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All threads of a cluster arrive, and go on from the wait when all have arrived. What a thread has
// read is read when it arrives; what it has written need not be seen by the others.
__device__ inline void arrive_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void wait_at_cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Whether the current GPU has clusters, and so all of the above.
inline bool has_clusters() {
  int device = 0, clusters = 0;
  check(cudaGetDevice(&device), "finding the GPU");
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "finding clusters");
  return clusters != 0;
}

// launch() with `cluster` blocks in a cluster along x; more than one asks for has_clusters().
template <typename... Params, typename... Args>
void launch_overlapping(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
                        unsigned cluster, Args&&... args) {
  const bool overlap = kOverlap && has_clusters();
  if (!overlap && cluster == 1) return launch(ctx, op, kernel, grid, std::forward<Args>(args)...);
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  if (overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(ctx);
  config.attrs = attributes;
  config.numAttrs = count;
  record_begin(ctx, op);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), op);
  record_end(ctx);
}

}  // namespace mamba3::cuda
