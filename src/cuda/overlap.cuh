#pragma once

// What kernels of launch_overlapping() call, which begin while the kernel before them ends. In a
// decode step of many short kernels that hides most of the time to start one ("programmatic
// dependent launch", from compute capability 9.0 on). Below, these do nothing.
//
// Such a kernel calls wait_for_earlier_kernels() in every thread, also in those that have nothing
// to do, and before that touches nothing but weights and what the host alone writes. Until then
// several kernels before it may still run, read and write, since each lets its next one start
// early. A kernel of launch() begins when all before it have ended, as ever.

#include "cuda/launch.cuh"

namespace mamba3::cuda {

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

}  // namespace mamba3::cuda
