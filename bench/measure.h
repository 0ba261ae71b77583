#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "core/context.h"

// Timing. Our own loop rather than Google Benchmark: the numbers we want are fractions of ceilings
// that are measured in the same run, on buffers in rotation (an op of a few megabytes would
// otherwise be timed in the last-level cache, where its data is not when a model runs), and of all
// that a benchmark library would bring we would use the clock.
namespace mamba3::bench {

// The tensors of one call: memory that lives as long as this does.
class Buffers {
 public:
  Buffers() = default;
  Buffers(Buffers&&) = default;

  // Normal with mean 0 and deviation 1 (the same few thousand draws over and over).
  View normal(std::initializer_list<int64_t> dims, DType dtype = DType::f32);
  View zeros(std::initializer_list<int64_t> dims, DType dtype = DType::f32);
  View integers(std::initializer_list<int64_t> dims, int64_t low, int64_t high);  // i32
  View range(int64_t n);                                                          // i32: 0 .. n-1

  int64_t bytes() const { return bytes_; }

 private:
  View take(std::initializer_list<int64_t> dims, DType dtype);

  struct Free {
    void operator()(void* memory) const;
  };
  std::vector<std::unique_ptr<void, Free>> memory_;
  int64_t bytes_ = 0;
};

// What one call must at least read and write, and compute.
struct Work {
  double bytes = 0;
  double flops = 0;
};

using Call = std::function<void(Context& ctx)>;

struct Benchmark {
  std::string op, name, shape;
  Work work;
  // Makes the tensors of a call. Called until the buffers do not fit the caches, or there are
  // `copies` of them.
  std::function<Call(Buffers& buffers)> prepare;
  int64_t copies = 256;
};

struct Timing {
  double min_time = 0.2;    // seconds of measurement a row
  int64_t fewest_runs = 5;  // whatever they take
};

// Median seconds of a call, after a warm-up.
double median_seconds(Context& ctx, const Benchmark& benchmark, const Timing& timing);

// The best that this machine does, with as many threads.
struct Ceilings {
  double copy = 0;  // bytes per second, read and written, of a copy that is far larger than caches
  double matrix = 0;  // FLOP per second of the f32 matrix product, the best of a few shapes
};

Ceilings measure_ceilings(Context& ctx, const Timing& timing);

}  // namespace mamba3::bench
