#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/context.h"

namespace mamba3 {

namespace cuda {
struct Recording;  // src/cuda/graph.cc
}  // namespace cuda

// A sequence of ops that is run again and again on the same memory. On the GPU it is recorded as a
// CUDA graph and replayed, which costs the host one launch instead of one an op. On the CPU, and
// while a profile is taken, it simply runs.
class Graph {
 public:
  // Runs `ops`. On the GPU the first run is an ordinary one, which brings scratch and plans to
  // their final size; the second is recorded; later ones replay what was recorded and do not call
  // `ops`. So `ops` does nothing but call ops on ctx: no allocation, no waiting, no host memory.
  // Throws Error if that cannot be recorded.
  void run(Context& ctx, const std::function<void()>& ops);

  // What the ops refer to has changed: start over. A change of the scratch is noticed by itself.
  void clear();

  bool recorded() const { return recording_ != nullptr; }

 private:
  bool warm_ = false;
  int64_t allocations_ = 0;  // of the scratch that was recorded
  std::shared_ptr<cuda::Recording> recording_;
};

namespace cuda {
std::shared_ptr<Recording> record(Context& ctx, const std::function<void()>& ops);
void replay(Context& ctx, const Recording& recording);
}  // namespace cuda

}  // namespace mamba3
