#include "infer/stop_scanner.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace mamba3 {

namespace {

// Length of the longest end of `text` with which `stop` begins, without being complete.
size_t overlap(std::string_view text, std::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.ends_with(stop.substr(0, n))) return n;
  }
  return 0;
}

}  // namespace

StopScanner::StopScanner(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) {
    if (stop.empty()) input_error("a stop text must not be empty");
  }
}

std::string StopScanner::push(std::string_view piece) {
  if (stopped_) return {};
  pending_ += piece;
  size_t first = std::string::npos, held = 0;
  for (const std::string& stop : stops_) {
    first = std::min(first, pending_.find(stop));
    held = std::max(held, overlap(pending_, stop));
  }
  stopped_ = first != std::string::npos;
  const size_t shown = stopped_ ? first : pending_.size() - held;
  std::string out = pending_.substr(0, shown);
  pending_.erase(0, stopped_ ? pending_.size() : shown);
  return out;
}

std::string StopScanner::finish() {
  return std::exchange(pending_, {});
}

}  // namespace mamba3
