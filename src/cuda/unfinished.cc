// Stands in for the ops that have no kernels yet.

#include "core/error.h"
#include "core/memory.h"
#include "ops/adamw.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/mixer_scan.h"
#include "ops/rms_norm.h"
#include "ops/sample.h"
#include "ops/swiglu.h"

namespace mamba3::cuda {

namespace {

[[noreturn]] void unavailable(const char* op) {
  input_error("[{}] this op has no GPU kernel yet; use the CPU", op);
}

}  // namespace

__attribute__((weak)) void adamw(Context&, const AdamwArgs&) {
  unavailable("adamw");
}
__attribute__((weak)) void cross_entropy(Context&, const CrossEntropyArgs&) {
  unavailable("cross_entropy");
}
__attribute__((weak)) void embedding(Context&, const EmbeddingArgs&) {
  unavailable("embedding");
}
__attribute__((weak)) void embedding_backward(Context&, const EmbeddingBackwardArgs&) {
  unavailable("embedding_backward");
}
__attribute__((weak)) void linear(Context&, const LinearArgs&) {
  unavailable("linear");
}
__attribute__((weak)) void linear_backward(Context&, const LinearBackwardArgs&) {
  unavailable("linear_backward");
}
__attribute__((weak)) void mixer_scan_backward(Context&, const MixerScanBackwardArgs&) {
  unavailable("mixer_scan_backward");
}
__attribute__((weak)) void rms_norm(Context&, const RmsNormArgs&) {
  unavailable("rms_norm");
}
__attribute__((weak)) void rms_norm_backward(Context&, const RmsNormBackwardArgs&) {
  unavailable("rms_norm_backward");
}
__attribute__((weak)) void sample(Context&, const SampleArgs&) {
  unavailable("sample");
}
__attribute__((weak)) void swiglu(Context&, const SwigluArgs&) {
  unavailable("swiglu");
}
__attribute__((weak)) void swiglu_backward(Context&, const SwigluBackwardArgs&) {
  unavailable("swiglu_backward");
}

}  // namespace mamba3::cuda
