#include "core/graph.h"

#include "core/timing.h"

namespace mamba3 {

void Graph::clear() {
  warm_ = false;
  recording_ = nullptr;
}

void Graph::run(Context& ctx, const std::function<void()>& ops) {
  if (ctx.device == Device::cpu || profiling(ctx)) return ops();
  if (recording_ != nullptr && ctx.scratch.allocations() != allocations_) clear();
  if (!warm_) {
    ops();
    warm_ = true;
    return;
  }
  if (recording_ == nullptr) {
    recording_ = cuda::record(ctx, ops);
    allocations_ = ctx.scratch.allocations();
  }
  cuda::replay(ctx, *recording_);
}

}  // namespace mamba3
