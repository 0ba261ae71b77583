#include "bench/measure.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/random.h"
#include "cpu/gemm.h"

namespace mamba3::bench {

namespace {

using Clock = std::chrono::steady_clock;

// Buffers in rotation are together this large, so that each comes from memory.
int64_t cold_bytes() {
  int64_t last_level_cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  last_level_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return std::max<int64_t>(int64_t{128} << 20, 4 * last_level_cache);
}

template <typename Run>
double seconds_of(const Run& run) {
  const auto start = Clock::now();
  run();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Median of run(0), run(1), ...
template <typename Run>
double median_of_runs(const Timing& timing, const Run& run) {
  std::vector<double> seconds;
  double total = 0;
  for (int64_t i = 0; i < timing.fewest_runs || total < timing.min_time; ++i) {
    seconds.push_back(seconds_of([&] { run(i); }));
    total += seconds.back();
  }
  const auto middle = seconds.begin() + static_cast<int64_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

double copy_rate(Context& ctx, const Timing& timing) {
  const int64_t n = cold_bytes();
  Buffers buffers;
  const View from = buffers.zeros({n}, DType::u8), to = buffers.zeros({n}, DType::u8);
  const double seconds = median_of_runs(timing, [&](int64_t) {
    ctx.threads.parallel_for(n, 1 << 20, [&](int64_t begin, int64_t end, int) {
      std::memcpy(to.as<uint8_t>() + begin, from.as<uint8_t>() + begin,
                  static_cast<size_t>(end - begin));
    });
  });
  return 2 * static_cast<double>(n) / seconds;
}

double matrix_rate(Context& ctx, const Timing& timing) {
  double best = 0;
  for (const auto& [M, N, K] :
       {std::array<int64_t, 3>{1024, 1024, 1024}, {2048, 768, 768}, {512, 512, 4096}}) {
    Buffers buffers;
    const View a = buffers.normal({M, K}), b = buffers.normal({K, N}), c = buffers.zeros({M, N});
    const cpu::Gemm product{.M = M,
                            .N = N,
                            .K = K,
                            .a = a.as<float>(),
                            .lda = K,
                            .b = b.as<float>(),
                            .ldb = N,
                            .c = c.as<float>(),
                            .ldc = N};
    cpu::gemm(ctx, product);
    const double seconds = median_of_runs(timing, [&](int64_t) { cpu::gemm(ctx, product); });
    best = std::max(best, 2.0 * static_cast<double>(M * N * K) / seconds);
  }
  return best;
}

}  // namespace

void Buffers::Free::operator()(void* memory) const {
  std::free(memory);
}

View Buffers::take(std::initializer_list<int64_t> dims, DType dtype) {
  constexpr size_t kAlignment = 64;
  View view = make_view(nullptr, dtype, dims);
  const auto size =
      (static_cast<size_t>(view.bytes()) + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  view.data = std::aligned_alloc(kAlignment, size);
  if (!view.data) throw std::bad_alloc();
  memory_.emplace_back(view.data);
  bytes_ += static_cast<int64_t>(size);
  return view;
}

View Buffers::zeros(std::initializer_list<int64_t> dims, DType dtype) {
  const View view = take(dims, dtype);
  std::memset(view.data, 0, static_cast<size_t>(view.bytes()));
  return view;
}

View Buffers::normal(std::initializer_list<int64_t> dims, DType dtype) {
  static const auto kDraws = [] {
    std::array<float, 4096> draws;
    Random random(1);
    for (float& draw : draws) draw = static_cast<float>(random.normal());
    return draws;
  }();
  const View view = take(dims, dtype);
  constexpr auto kBlock = static_cast<int64_t>(kDraws.size());
  for (int64_t i = 0; i < view.size(); i += kBlock) {
    from_float(kDraws.data(), static_cast<char*>(view.data) + i * size_of(dtype), dtype,
               std::min(kBlock, view.size() - i));
  }
  return view;
}

View Buffers::integers(std::initializer_list<int64_t> dims, int64_t low, int64_t high) {
  const View view = take(dims, DType::i32);
  Random random(2);
  for (int64_t i = 0; i < view.size(); ++i) {
    view.as<int32_t>()[i] = static_cast<int32_t>(low + random.below(high - low));
  }
  return view;
}

View Buffers::range(int64_t n) {
  const View view = take({n}, DType::i32);
  for (int64_t i = 0; i < n; ++i) view.as<int32_t>()[i] = static_cast<int32_t>(i);
  return view;
}

double median_seconds(Context& ctx, const Benchmark& benchmark, const Timing& timing) {
  std::vector<Buffers> buffers;
  std::vector<Call> calls;
  int64_t bytes = 0;
  while (calls.empty() ||
         (bytes < cold_bytes() && static_cast<int64_t>(calls.size()) < benchmark.copies)) {
    buffers.emplace_back();
    calls.push_back(benchmark.prepare(buffers.back()));
    bytes += buffers.back().bytes();
  }
  calls.front()(ctx);  // scratch grows to its size, kernels are chosen
  return median_of_runs(timing,
                        [&](int64_t i) { calls[static_cast<size_t>(i) % calls.size()](ctx); });
}

Ceilings measure_ceilings(Context& ctx, const Timing& timing) {
  return {.copy = copy_rate(ctx, timing), .matrix = matrix_rate(ctx, timing)};
}

}  // namespace mamba3::bench
