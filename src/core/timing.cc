#include "core/timing.h"

#include <algorithm>
#include <chrono>

#include "core/error.h"

namespace mamba3 {

double device_seconds(Context& ctx, const std::function<void()>& run, double head_start) {
  if (ctx.device == Device::cuda) return cuda::device_seconds(ctx, run, head_start);
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void start_profile(Context& ctx) {
  if (ctx.device == Device::cpu) input_error("a profile can be taken on the GPU only");
  cuda::start_profile(ctx);
}

std::vector<OpTime> finish_profile(Context& ctx) {
  if (!profiling(ctx)) error("there is no profile to finish");
  std::vector<OpTime> times = cuda::finish_profile(ctx);
  std::stable_sort(times.begin(), times.end(),
                   [](const OpTime& a, const OpTime& b) { return a.seconds > b.seconds; });
  return times;
}

bool profiling(const Context& ctx) {
  return ctx.device == Device::cuda && cuda::profiling(ctx);
}

}  // namespace mamba3
