#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

namespace mamba3 {

// A line of metrics.jsonl: what one update did. Absent values are left out of the line.
struct MetricsRow {
  int64_t step = 0;    // updates made, this one included
  int64_t tokens = 0;  // tokens trained on, this update included
  double seconds = 0;  // time spent training
  double loss = 0;     // nats per scored token of this update's batch
  double lr = 0;
  double grad_norm = 0;  // before clipping
  double tokens_per_second = 0;
  bool skipped = false;  // not finite: no update was made
  std::optional<double> val_loss = {};
  std::optional<double> bits_per_byte = {};  // of the validation text
  std::optional<double> accuracy = {};       // of a task, at the final answer
  std::optional<std::string> sample = {};    // text that the model wrote
};

std::string to_json(const MetricsRow& row);  // one line, without its end

// The metrics file of a run, one JSON object a line.
class MetricsLog {
 public:
  // Opens the file to append. Lines of steps after `last_step` (a run that was cut after its last
  // checkpoint) and a line that was cut are removed first, so that no step occurs twice.
  MetricsLog(const std::filesystem::path& file, int64_t last_step);

  // Written through at once. Throws Error when the disk is full.
  void append(const MetricsRow& row);

 private:
  std::filesystem::path file_;
  std::ofstream out_;
};

}  // namespace mamba3
