#include "train/metrics.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"

namespace mamba3 {

namespace {

using nlohmann::ordered_json;

// Six digits say all that a curve needs. JSON has no infinity or NaN: null.
ordered_json rounded(double value) {
  if (!std::isfinite(value)) return nullptr;
  return ordered_json::parse(fmt::format("{:.6g}", value));
}

// Bytes of the lines, from the start, that belong to steps up to `last_step`.
std::uintmax_t kept_bytes(const std::filesystem::path& file, int64_t last_step) {
  std::ifstream in(file, std::ios::binary);
  std::uintmax_t bytes = 0;
  for (std::string line; std::getline(in, line) && !in.eof(); bytes += line.size() + 1) {
    const auto row = ordered_json::parse(line, nullptr, false);
    if (!row.is_object() || !row.contains("step") || !row["step"].is_number_integer()) break;
    if (row["step"].get<int64_t>() > last_step) break;
  }
  return bytes;
}

}  // namespace

std::string to_json(const MetricsRow& row) {
  ordered_json json;
  json["step"] = row.step;
  json["tokens"] = row.tokens;
  json["seconds"] = rounded(row.seconds);
  json["loss"] = rounded(row.loss);
  json["lr"] = rounded(row.lr);
  json["grad_norm"] = rounded(row.grad_norm);
  json["tokens_per_s"] = rounded(row.tokens_per_second);
  if (row.skipped) json["skipped"] = true;
  if (row.val_loss) json["val_loss"] = rounded(*row.val_loss);
  if (row.bits_per_byte) json["bits_per_byte"] = rounded(*row.bits_per_byte);
  if (row.accuracy) json["accuracy"] = rounded(*row.accuracy);
  if (row.sample) json["sample"] = *row.sample;
  // A sample of bytes need not be UTF-8.
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

MetricsLog::MetricsLog(const std::filesystem::path& file, int64_t last_step) : file_(file) {
  std::error_code failure;
  if (std::filesystem::is_regular_file(file)) {
    std::filesystem::resize_file(file, kept_bytes(file, last_step), failure);
  }
  out_.open(file, std::ios::binary | std::ios::app);
  if (failure || !out_) error("cannot write the metrics to {}", file.string());
}

void MetricsLog::append(const MetricsRow& row) {
  out_ << to_json(row) << '\n' << std::flush;
  if (!out_) error("cannot write the metrics to {}: is the disk full?", file_.string());
}

}  // namespace mamba3
