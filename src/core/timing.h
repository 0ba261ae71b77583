#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/context.h"

namespace mamba3 {

// Seconds that the device takes for what `run` asks of ctx. The GPU begins `head_start` seconds
// late: when that is longer than the host needs to ask, the gaps between launches are not seen.
double device_seconds(Context& ctx, const std::function<void()>& run, double head_start = 0);

// What one op did while a profile was taken.
struct OpTime {
  std::string op;
  int64_t launches = 0;  // kernels, products of cuBLAS and copies
  double seconds = 0;
};

// From start_profile() to finish_profile() the GPU's work for ctx is timed, launch by launch. For
// shares, not for speed: events between the launches keep them from overlapping and add about a
// microsecond to each, no graph is replayed, and after every synchronize() the GPU waits until the
// host is ahead of it. finish_profile() waits for the GPU; the largest op comes first. InputError
// on the CPU.
void start_profile(Context& ctx);
std::vector<OpTime> finish_profile(Context& ctx);
bool profiling(const Context& ctx);

namespace cuda {
double device_seconds(Context& ctx, const std::function<void()>& run, double head_start);
void start_profile(Context& ctx);
std::vector<OpTime> finish_profile(Context& ctx);
bool profiling(const Context& ctx);
}  // namespace cuda

}  // namespace mamba3
