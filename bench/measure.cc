#include "bench/measure.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <numeric>

#include "core/memory.h"
#include "core/random.h"
#include "cpu/gemm.h"
#include "ops/linear.h"

namespace mamba3::bench {

namespace {

using Clock = std::chrono::steady_clock;

// A batch of calls on the GPU takes so long, for which an event is precise enough, but has at most
// so many calls: more launches than a stream's queue holds would make the host wait.
constexpr double kBatchSeconds = 5e-4;
constexpr int64_t kLargestBatch = 16;
constexpr double kLongestHeadStart = 0.02;
constexpr int64_t kProfiledCalls = 3;

// Buffers in rotation are together this large, so that each comes from memory.
int64_t cold_bytes(Device device) {
  // Four times the largest L2 there is: 126 MB.
  if (device == Device::cuda) return int64_t{512} << 20;
  int64_t last_level_cache = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  last_level_cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return std::max<int64_t>(int64_t{128} << 20, 4 * last_level_cache);
}

// Median of what run(0), run(1), ... say they took.
template <typename Run>
double median_of_runs(const Timing& timing, const Run& run) {
  std::vector<double> seconds;
  double total = 0;
  for (int64_t i = 0; i < timing.fewest_runs || total < timing.min_time; ++i) {
    seconds.push_back(run(i));
    total += seconds.back();
  }
  const auto middle = seconds.begin() + static_cast<int64_t>(seconds.size() / 2);
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

template <typename Run>
double seconds_of(const Run& run) {
  const auto start = Clock::now();
  run();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double copy_rate(Context& ctx, const Timing& timing) {
  const int64_t n = cold_bytes(ctx.device);
  Buffers buffers(ctx);
  const View from = buffers.zeros({n}, DType::u8), to = buffers.zeros({n}, DType::u8);
  const auto run = [&] {
    if (ctx.device == Device::cuda) return copy(ctx, from, to);
    ctx.threads.parallel_for(n, 1 << 20, [&](int64_t begin, int64_t end, int) {
      std::memcpy(to.as<uint8_t>() + begin, from.as<uint8_t>() + begin,
                  static_cast<size_t>(end - begin));
    });
  };
  const double seconds = median_of_runs(timing, [&](int64_t) { return device_seconds(ctx, run); });
  return 2 * static_cast<double>(n) / seconds;
}

double cpu_matrix_rate(Context& ctx, const Timing& timing) {
  double best = 0;
  for (const auto& [M, N, K] :
       {std::array<int64_t, 3>{1024, 1024, 1024}, {2048, 768, 768}, {512, 512, 4096}}) {
    Buffers buffers(ctx);
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
    const auto run = [&] { cpu::gemm(ctx, product); };
    run();
    const double seconds =
        median_of_runs(timing, [&](int64_t) { return device_seconds(ctx, run); });
    best = std::max(best, 2.0 * static_cast<double>(M * N * K) / seconds);
  }
  return best;
}

double gpu_matrix_rate(Context& ctx, const Timing& timing, DType dtype) {
  constexpr int64_t n = 8192;
  Buffers buffers(ctx);
  const LinearArgs args{.x = buffers.normal({n, n}, dtype),
                        .weight = buffers.normal({n, n}, dtype),
                        .y = buffers.zeros({n, n}, dtype)};
  const auto run = [&] { linear(ctx, args); };
  run();
  const double seconds = median_of_runs(timing, [&](int64_t) { return device_seconds(ctx, run); });
  return 2.0 * static_cast<double>(n * n * n) / seconds;
}

using Calls = std::vector<Prepared>;

// Calls run back to back, the buffers in rotation, and the GPU starts so late that the host is
// always ahead of it.
double gpu_median(Context& ctx, const Calls& calls, const Timing& timing) {
  size_t next = 0;
  const auto run = [&] { calls[next++ % calls.size()].call(ctx); };
  const double once = device_seconds(ctx, run);
  const auto batch = static_cast<int64_t>(
      std::clamp(kBatchSeconds / once, 1.0, static_cast<double>(kLargestBatch)));
  const auto run_batch = [&] {
    for (int64_t i = 0; i < batch; ++i) run();
  };
  const double host = seconds_of(run_batch);
  synchronize(ctx);
  const double head_start = std::min(2 * host, kLongestHeadStart);
  return median_of_runs(timing, [&](int64_t) {
    return device_seconds(ctx, run_batch, head_start) / static_cast<double>(batch);
  });
}

std::vector<OpTime> profile_of(Context& ctx, const Prepared& prepared) {
  Context& where = prepared.own != nullptr ? *prepared.own : ctx;
  start_profile(where);
  for (int64_t i = 0; i < kProfiledCalls; ++i) {
    prepared.call(ctx);
    synchronize(where);
  }
  std::vector<OpTime> profile = finish_profile(where);
  for (OpTime& op : profile) {
    op.launches /= kProfiledCalls;
    op.seconds /= static_cast<double>(kProfiledCalls);
  }
  return profile;
}

}  // namespace

View Buffers::take(std::initializer_list<int64_t> dims, DType dtype) {
  View view = make_view(nullptr, dtype, dims, ctx_->device);
  memory_.push_back(allocate_bytes(ctx_->device, static_cast<size_t>(view.bytes())));
  view.data = memory_.back().get();
  bytes_ += view.bytes();
  return view;
}

View Buffers::zeros(std::initializer_list<int64_t> dims, DType dtype) {
  const View view = take(dims, dtype);
  zero(*ctx_, view);
  return view;
}

View Buffers::normal(std::initializer_list<int64_t> dims, DType dtype, float deviation) {
  static const auto kDraws = [] {
    std::vector<float> draws(65521);
    Random random(1);
    for (float& draw : draws) draw = static_cast<float>(random.normal());
    return draws;
  }();
  const View view = take(dims, dtype);
  const View flat = view.reshape({view.size()});
  const auto block = std::min<int64_t>(std::ssize(kDraws), view.size());
  std::vector<float> scaled(kDraws.begin(), kDraws.begin() + block);
  for (float& draw : scaled) draw *= deviation;
  std::vector<std::byte> converted(static_cast<size_t>(block * size_of(dtype)));
  from_float(scaled.data(), converted.data(), dtype, block);
  copy(*ctx_, make_view(converted.data(), dtype, {block}), flat.slice(0, 0, block));
  // What is there is doubled until it is enough, where the memory is.
  for (int64_t done = block; done < view.size();) {
    const int64_t more = std::min(done, view.size() - done);
    copy(*ctx_, flat.slice(0, 0, more), flat.slice(0, done, done + more));
    done += more;
  }
  return view;
}

View Buffers::values(const std::vector<int32_t>& values) {
  const View view = take({std::ssize(values)}, DType::i32);
  copy(*ctx_, view_of(values.data(), {std::ssize(values)}), view);
  return view;
}

View Buffers::integers(std::initializer_list<int64_t> dims, int64_t low, int64_t high) {
  int64_t size = 1;
  for (const int64_t dim : dims) size *= dim;
  std::vector<int32_t> drawn(static_cast<size_t>(size));
  Random random(2);
  for (int32_t& value : drawn) value = static_cast<int32_t>(low + random.below(high - low));
  return values(drawn).reshape(dims);
}

View Buffers::range(int64_t n) {
  std::vector<int32_t> rising(static_cast<size_t>(n));
  std::iota(rising.begin(), rising.end(), 0);
  return values(rising);
}

Measurement measure(Context& ctx, const Benchmark& benchmark, const Timing& timing) {
  cuda::reset_peak_bytes();
  std::vector<Buffers> buffers;
  Calls calls;
  int64_t bytes = 0;
  while (calls.empty() || (bytes < cold_bytes(ctx.device) &&
                           static_cast<int64_t>(calls.size()) < benchmark.copies)) {
    buffers.emplace_back(ctx);
    calls.push_back(benchmark.prepare(buffers.back()));
    bytes += buffers.back().bytes();
  }
  calls.front().call(ctx);  // scratch grows to its size, kernels are chosen
  Measurement result;
  if (ctx.device == Device::cuda && calls.front().own == nullptr) {
    result.seconds = gpu_median(ctx, calls, timing);
  } else {
    result.seconds = median_of_runs(timing, [&](int64_t i) {
      return seconds_of([&] { calls[static_cast<size_t>(i) % calls.size()].call(ctx); });
    });
  }
  result.peak_bytes = cuda::peak_bytes();
  if (timing.profile) result.profile = profile_of(ctx, calls.front());
  return result;
}

Ceilings measure_ceilings(Context& ctx, const Timing& timing) {
  if (ctx.device == Device::cpu) {
    return {.copy = copy_rate(ctx, timing), .matrix = cpu_matrix_rate(ctx, timing)};
  }
  return {.copy = copy_rate(ctx, timing),
          .matrix = gpu_matrix_rate(ctx, timing, DType::f32),
          .matrix_bf16 = gpu_matrix_rate(ctx, timing, DType::bf16)};
}

}  // namespace mamba3::bench
