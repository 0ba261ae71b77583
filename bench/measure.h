#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "core/timing.h"

// Timing. Our own loop rather than Google Benchmark: the numbers we want are fractions of ceilings
// that are measured in the same run, on buffers in rotation (an op of a few megabytes would
// otherwise be timed in the last-level cache, where its data is not when a model runs), and of all
// that a benchmark library would bring we would use the clock.
namespace mamba3::bench {

// The tensors of one call: memory where the context is, that lives as long as this does.
class Buffers {
 public:
  explicit Buffers(Context& ctx) : ctx_(&ctx) {}

  // Normal with mean 0 (the same 65521 draws over and over: a prime, so that the rows of a matrix
  // differ).
  View normal(std::initializer_list<int64_t> dims, DType dtype = DType::f32, float deviation = 1);
  View zeros(std::initializer_list<int64_t> dims, DType dtype = DType::f32);
  View integers(std::initializer_list<int64_t> dims, int64_t low, int64_t high);  // i32
  View range(int64_t n);                                                          // i32: 0 .. n-1
  View values(const std::vector<int32_t>& values);                                // i32, (n)

  int64_t bytes() const { return bytes_; }

 private:
  View take(std::initializer_list<int64_t> dims, DType dtype);

  Context* ctx_;
  std::vector<std::shared_ptr<void>> memory_;
  int64_t bytes_ = 0;
};

// What one call must at least read and write, and compute.
struct Work {
  double bytes = 0;
  double flops = 0;
};

using Call = std::function<void(Context& ctx)>;

// A call that can be made.
struct Prepared {
  // NOLINTNEXTLINE(google-explicit-constructor)
  Prepared(Call made, Context* context = nullptr) : call(std::move(made)), own(context) {}

  Call call;
  // Of a call that does not run in the context it is given but in its own, and waits there for its
  // end, or for that of the call before.
  Context* own;
};

struct Benchmark {
  std::string op, name, shape;
  Work work;
  DType dtype = DType::f32;  // that matrix products are made in
  int64_t tokens = 0;        // that a call of a model takes
  // Makes the tensors of a call. Called until the buffers do not fit the caches, or there are
  // `copies` of them.
  std::function<Prepared(Buffers& buffers)> prepare;
  int64_t copies = 256;
};

struct Timing {
  double min_time = 0.2;    // seconds of measurement a row
  int64_t fewest_runs = 5;  // whatever they take
  bool profile = false;     // whether to ask where the GPU's time goes
};

struct Measurement {
  double seconds = 0;           // of a call, the median after a warm-up
  int64_t peak_bytes = 0;       // of the GPU's memory
  std::vector<OpTime> profile;  // of a call, if wanted
};

// Ops are timed on their device, back to back: what a graph of them would take. Calls in a context
// of their own are timed by the host's clock, with all that the host does between launches.
Measurement measure(Context& ctx, const Benchmark& benchmark, const Timing& timing);

// The best that this machine does, on the CPU with as many threads.
struct Ceilings {
  double copy = 0;  // bytes per second, read and written, of a copy that is far larger than caches
  double matrix = 0;       // FLOP per second of the f32 matrix product, the best of a few shapes
  double matrix_bf16 = 0;  // likewise, on the GPU only

  double matrix_of(DType dtype) const { return dtype == DType::bf16 ? matrix_bf16 : matrix; }
};

Ceilings measure_ceilings(Context& ctx, const Timing& timing);

}  // namespace mamba3::bench
