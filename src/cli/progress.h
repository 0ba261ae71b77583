#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>
#include <string_view>

namespace mamba3::cli {

// What a progress bar shows. Drawing it is a pure function of this.
struct ProgressState {
  std::string_view label;   // "train"
  std::string_view unit;    // what is counted: "tokens"
  int64_t first = 0;        // where this run began: above 0 when it resumes earlier work
  int64_t done = 0;         // of `total`, `first` included
  int64_t total = 0;        // 0: unknown
  double seconds = 0;       // since this run began
  std::string_view detail;  // free text: "loss 2.310"
};

// "train  42% [========>           ] 1.2M/2.9M tokens  12.3k tokens/s  loss 2.310  0:35 left", the
// bar as long as fits into `columns`, nothing beyond them.
std::string progress_bar(const ProgressState& state, int columns);
// The same without the bar.
std::string progress_line(const ProgressState& state);

std::string short_count(double count);   // 950, 12.3k, 4.56M
std::string clock_time(double seconds);  // 0:35, 12:08, 1:02:03

// Shows progress on `out`: a bar if that is a terminal, else a plain line every ten seconds. For
// one thread.
class Progress {
 public:
  Progress(std::string label, std::string unit, int64_t total, int64_t first = 0,
           FILE* out = stderr);
  ~Progress();  // ends the line, also when an exception is on its way
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void set_total(int64_t total) { total_ = total; }
  // Cheap: draws ten times a second at most.
  void update(int64_t done, std::string detail = {});
  // Takes the bar off the screen, so that something else can be printed; the next update redraws.
  void hide();
  // Draws the last state and ends the line. Later calls do nothing.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  ProgressState state() const;
  void draw();

  std::string label_, unit_, detail_;
  int64_t total_, first_, done_;
  FILE* out_;
  bool terminal_;
  bool finished_ = false;
  Clock::time_point begin_ = Clock::now();
  Clock::time_point next_draw_;
};

}  // namespace mamba3::cli
