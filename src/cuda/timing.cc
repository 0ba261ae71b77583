#include "cuda/timing.h"

#include <map>

#include "core/memory.h"

namespace mamba3::cuda {

namespace {

// In this time the host asks for a step of a large model.
constexpr double kHeadStart = 5e-3;

}  // namespace

Event::Event() {
  check(cudaEventCreate(&event_), "making an event");
}

Event::~Event() {
  cudaEventDestroy(event_);
}

void Event::record(Context& ctx) {
  check(cudaEventRecord(event_, stream_of(ctx)), "recording an event");
}

double Event::seconds_since(const Event& earlier) const {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, earlier.event_, event_), "timing");
  return 1e-3 * static_cast<double>(milliseconds);
}

void Recorder::begin(Context& ctx, const char* op) {
  if (!ahead_) idle(ctx, kHeadStart);
  ahead_ = true;
  spans_.push_back(std::make_unique<Span>());
  spans_.back()->op = op;
  spans_.back()->begin.record(ctx);
}

void Recorder::end(Context& ctx) {
  spans_.back()->end.record(ctx);
}

std::vector<OpTime> Recorder::sum() const {
  std::map<std::string_view, OpTime> sums;
  for (const auto& span : spans_) {
    OpTime& sum = sums[span->op];
    sum.launches += 1;
    sum.seconds += span->end.seconds_since(span->begin);
  }
  std::vector<OpTime> times;
  for (auto& [op, sum] : sums) {
    sum.op = op;
    times.push_back(sum);
  }
  return times;
}

void record_begin(Context& ctx, const char* op) {
  if (ctx.stream->recorder != nullptr) ctx.stream->recorder->begin(ctx, op);
}

void record_end(Context& ctx) {
  if (ctx.stream->recorder != nullptr) ctx.stream->recorder->end(ctx);
}

double device_seconds(Context& ctx, const std::function<void()>& run, double head_start) {
  Event begin, end;
  if (head_start > 0) idle(ctx, head_start);
  begin.record(ctx);
  run();
  end.record(ctx);
  cuda::synchronize(ctx);
  return end.seconds_since(begin);
}

void start_profile(Context& ctx) {
  ctx.stream->recorder = std::make_shared<Recorder>();
}

std::vector<OpTime> finish_profile(Context& ctx) {
  cuda::synchronize(ctx);
  const std::shared_ptr<Recorder> recorder = std::move(ctx.stream->recorder);
  ctx.stream->recorder = nullptr;
  return recorder->sum();
}

bool profiling(const Context& ctx) {
  return ctx.stream->recorder != nullptr;
}

}  // namespace mamba3::cuda
