#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

#include "core/timing.h"
#include "cuda/runtime.h"

namespace mamba3::cuda {

// A point in a stream's work, whose time can be asked for.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Context& ctx);
  double seconds_since(const Event& earlier) const;  // both must be over

 private:
  cudaEvent_t event_ = nullptr;
};

// Lets the GPU do nothing for so long.
void idle(Context& ctx, double seconds);

// The profile of a stream: two events around every launch.
class Recorder {
 public:
  void begin(Context& ctx, const char* op);
  void end(Context& ctx);
  // The host has waited for the GPU, and is no longer ahead of it.
  void synchronized() { ahead_ = false; }

  std::vector<OpTime> sum() const;

 private:
  struct Span {
    std::string_view op;  // a literal
    Event begin, end;
  };
  std::vector<std::unique_ptr<Span>> spans_;
  bool ahead_ = false;
};

}  // namespace mamba3::cuda
