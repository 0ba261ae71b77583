#pragma once

#include <string>

#include "bench/measure.h"

namespace mamba3::bench {

// The lines in which measurements are told: a table for people, or a JSON object a line. Every
// text ends with a newline.
class Report {
 public:
  Report(bool json, Device device, int threads, const Ceilings& ceilings)
      : json_(json), device_(device), threads_(threads), ceilings_(ceilings) {}

  std::string head() const;
  // With the head of the table before the first row.
  std::string row(const Benchmark& benchmark, const Measurement& measured);
  // Where the GPU's time goes: a line for each op, or one object.
  std::string profile(const Benchmark& benchmark, const Measurement& measured) const;

 private:
  bool json_;
  Device device_;
  int threads_;
  Ceilings ceilings_;
  bool has_head_ = false;
};

}  // namespace mamba3::bench
