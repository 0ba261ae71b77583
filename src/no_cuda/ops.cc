// The GPU side of every op in a program built without CUDA.

#include "core/error.h"
#include "core/fetch.h"
#include "core/gpu_info.h"
#include "core/graph.h"
#include "core/memory.h"
#include "core/timing.h"
#include "ops/adamw.h"
#include "ops/add_sum.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/delta_scan.h"
#include "ops/delta_step.h"
#include "ops/embedding.h"
#include "ops/grouped_rms_norm.h"
#include "ops/increment.h"
#include "ops/linear.h"
#include "ops/linear_swiglu.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/rotary.h"
#include "ops/sample.h"
#include "ops/short_conv.h"
#include "ops/swiglu.h"

namespace mamba3::cuda {

namespace {

[[noreturn]] void unavailable(const char* op) {
  input_error("[{}] this build has no CUDA; use the CPU, or build with -DMAMBA3_CUDA=ON", op);
}

}  // namespace

bool available() {
  return false;
}
std::shared_ptr<Stream> make_stream() {
  input_error("this build has no CUDA; use --device cpu, or build with -DMAMBA3_CUDA=ON");
}
GpuInfo gpu_info() {
  input_error("this build has no CUDA, so no GPU: build with -DMAMBA3_CUDA=ON");
}
std::shared_ptr<void> allocate_bytes(size_t) {
  unavailable("memory");
}
int64_t peak_bytes() {
  return 0;
}
void reset_peak_bytes() {}
void copy_bytes(Context&, const void*, void*, size_t, bool) {
  unavailable("copy");
}
void zero_bytes(Context&, void*, size_t) {
  unavailable("zero");
}
void zero_new_bytes(void*, size_t) {
  unavailable("zero");
}
void synchronize(Context&) {
  unavailable("synchronize");
}
std::shared_ptr<Recording> record(Context&, const std::function<void()>&) {
  unavailable("graph");
}
void replay(Context&, const Recording&) {
  unavailable("graph");
}
std::shared_ptr<Mailbox> make_mailbox(size_t) {
  unavailable("fetch");
}
void send(Context&, Mailbox&, const void*, size_t) {
  unavailable("fetch");
}
const void* receive(Mailbox&) {
  unavailable("fetch");
}
double device_seconds(Context&, const std::function<void()>&, double) {
  unavailable("timing");
}
void start_profile(Context&) {
  unavailable("profile");
}
std::vector<OpTime> finish_profile(Context&) {
  unavailable("profile");
}
bool profiling(const Context&) {
  return false;
}

void add_sum(Context&, const AddSumArgs&) {
  unavailable("add_sum");
}
void adamw(Context&, const AdamwArgs&) {
  unavailable("adamw");
}
void attention(Context&, const AttentionArgs&) {
  unavailable("attention");
}
void attention_backward(Context&, const AttentionBackwardArgs&) {
  unavailable("attention_backward");
}
void attention_step(Context&, const AttentionArgs&) {
  unavailable("attention_step");
}
void cross_entropy(Context&, const CrossEntropyArgs&) {
  unavailable("cross_entropy");
}
void delta_scan(Context&, const DeltaScanArgs&) {
  unavailable("delta_scan");
}
void delta_scan_backward(Context&, const DeltaScanBackwardArgs&) {
  unavailable("delta_scan_backward");
}
void delta_step(Context&, const DeltaStepArgs&) {
  unavailable("delta_step");
}
void embedding(Context&, const EmbeddingArgs&) {
  unavailable("embedding");
}
void embedding_backward(Context&, const EmbeddingBackwardArgs&) {
  unavailable("embedding_backward");
}
void grouped_rms_norm(Context&, const GroupedRmsNormArgs&) {
  unavailable("grouped_rms_norm");
}
void grouped_rms_norm_backward(Context&, const GroupedRmsNormBackwardArgs&) {
  unavailable("grouped_rms_norm_backward");
}
void increment(Context&, const IncrementArgs&) {
  unavailable("increment");
}
void linear(Context&, const LinearArgs&) {
  unavailable("linear");
}
void linear_backward(Context&, const LinearBackwardArgs&) {
  unavailable("linear_backward");
}
bool linear_swiglu(Context&, const LinearSwigluArgs&) {
  unavailable("linear_swiglu");
}
void mixer_scan(Context&, const MixerScanArgs&) {
  unavailable("mixer_scan");
}
void mixer_scan_backward(Context&, const MixerScanBackwardArgs&) {
  unavailable("mixer_scan_backward");
}
void mixer_step(Context&, const MixerStepArgs&) {
  unavailable("mixer_step");
}
void rms_norm(Context&, const RmsNormArgs&) {
  unavailable("rms_norm");
}
void rms_norm_backward(Context&, const RmsNormBackwardArgs&) {
  unavailable("rms_norm_backward");
}
void rotary(Context&, const RotaryArgs&) {
  unavailable("rotary");
}
void sample(Context&, const SampleArgs&) {
  unavailable("sample");
}
void short_conv(Context&, const ShortConvArgs&) {
  unavailable("short_conv");
}
void short_conv_backward(Context&, const ShortConvBackwardArgs&) {
  unavailable("short_conv_backward");
}
void swiglu(Context&, const SwigluArgs&) {
  unavailable("swiglu");
}
void swiglu_backward(Context&, const SwigluBackwardArgs&) {
  unavailable("swiglu_backward");
}

}  // namespace mamba3::cuda
