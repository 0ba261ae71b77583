#include "bench/report.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "model/tensors.h"

namespace mamba3::bench {

namespace {

using Json = nlohmann::ordered_json;

std::string readable_time(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.2f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.3f} s", seconds);
}

std::string line(const Json& object) {
  return object.dump() + "\n";
}

double total_seconds(const std::vector<OpTime>& profile) {
  double total = 0;
  for (const OpTime& op : profile) total += op.seconds;
  return total;
}

}  // namespace

std::string Report::head() const {
  const double copy = ceilings_.copy * 1e-9, f32 = ceilings_.matrix * 1e-9;
  const double bf16 = ceilings_.matrix_bf16 * 1e-9;
  const bool gpu = device_ == Device::cuda;
  if (json_) {
    Json ceiling{{"op", "ceiling"},
                 {"device", name_of(device_)},
                 {"threads", threads_},
                 {"copy_gb_per_s", copy},
                 {"matrix_gflop_per_s", f32}};
    if (gpu) ceiling["bf16_matrix_gflop_per_s"] = bf16;
    return line(ceiling);
  }
  if (gpu) {
    return fmt::format(
        "GPU; ceilings: copy {:.0f} GB/s, matrix product {:.0f} GFLOP/s in bf16, {:.0f} in f32\n",
        copy, bf16, f32);
  }
  return fmt::format("{} threads; ceilings: copy {:.1f} GB/s, f32 matrix product {:.1f} GFLOP/s\n",
                     threads_, copy, f32);
}

std::string Report::row(const Benchmark& benchmark, const Measurement& measured) {
  const double seconds = measured.seconds;
  const double bytes = benchmark.work.bytes / seconds, flops = benchmark.work.flops / seconds;
  const double copy_fraction = bytes / ceilings_.copy;
  const double matrix_fraction = flops / ceilings_.matrix_of(benchmark.dtype);
  const double tokens = static_cast<double>(benchmark.tokens) / seconds;
  const bool model = benchmark.tokens > 0, gpu = device_ == Device::cuda;
  if (json_) {
    Json row{{"op", benchmark.op},
             {"case", benchmark.name},
             {"shape", benchmark.shape},
             {"median_s", seconds},
             {"gb_per_s", bytes * 1e-9},
             {"gflop_per_s", flops * 1e-9},
             {"copy_fraction", copy_fraction},
             {"matrix_fraction", matrix_fraction}};
    if (model) row["tokens_per_s"] = tokens;
    if (model && gpu) row["peak_bytes"] = measured.peak_bytes;
    return line(row);
  }
  std::string text;
  if (!has_head_) {
    text = fmt::format("{:<20} {:<22} {:<38} {:>10} {:>7} {:>7} {:>8} {:>9}", "op", "case", "shape",
                       "median", "GB/s", "of copy", "GFLOP/s", "of matrix");
    if (model) text += fmt::format(" {:>10}", "tokens/s");
    if (model && gpu) text += fmt::format(" {:>9}", "memory");
    text += "\n";
    has_head_ = true;
  }
  text += fmt::format("{:<20} {:<22} {:<38} {:>10} {:>7.1f} {:>6.0f}% {:>8} {:>9}", benchmark.op,
                      benchmark.name, benchmark.shape, readable_time(seconds), bytes * 1e-9,
                      100 * copy_fraction, flops > 0 ? fmt::format("{:.1f}", flops * 1e-9) : "",
                      flops > 0 ? fmt::format("{:.0f}%", 100 * matrix_fraction) : "");
  if (model) text += fmt::format(" {:>10.1f}", tokens);
  if (model && gpu) {
    text += fmt::format(" {:>6.2f} GB", static_cast<double>(measured.peak_bytes) * 1e-9);
  }
  return text + "\n";
}

std::string Report::profile(const Benchmark& benchmark, const Measurement& measured) const {
  const double total = total_seconds(measured.profile);
  if (json_) {
    Json ops = Json::array();
    for (const OpTime& op : measured.profile) {
      ops.push_back({{"op", op.op},
                     {"launches", op.launches},
                     {"seconds", op.seconds},
                     {"share", op.seconds / total}});
    }
    return line({{"op", "profile"},
                 {"of", benchmark.op},
                 {"case", benchmark.name},
                 {"shape", benchmark.shape},
                 {"ops", ops}});
  }
  std::string text;
  for (const OpTime& op : measured.profile) {
    text += fmt::format("  {:<20} {:>5.1f}% {:>10} in {} launches\n", op.op,
                        100 * op.seconds / total, readable_time(op.seconds), op.launches);
  }
  return text;
}

}  // namespace mamba3::bench
