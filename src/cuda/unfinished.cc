// Stands in for the ops that have no kernels yet.

#include "core/error.h"
#include "core/memory.h"
#include "ops/mixer_scan.h"

namespace mamba3::cuda {

namespace {

[[noreturn]] void unavailable(const char* op) {
  input_error("[{}] this op has no GPU kernel yet; use the CPU", op);
}

}  // namespace

__attribute__((weak)) void mixer_scan_backward(Context&, const MixerScanBackwardArgs&) {
  unavailable("mixer_scan_backward");
}

}  // namespace mamba3::cuda
