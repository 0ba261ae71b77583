#include "cli/progress.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

namespace mamba3::cli {

namespace {

constexpr std::chrono::milliseconds kRedraw{100};
constexpr std::chrono::seconds kPlainLine{10};
constexpr int kShortestBar = 10, kLongestBar = 40;

double fraction(const ProgressState& state) {
  return std::clamp(static_cast<double>(state.done) / static_cast<double>(state.total), 0.0, 1.0);
}

std::string percent(const ProgressState& state) {
  // Rounded down: 100% means done.
  return fmt::format("{:3}%", static_cast<int>(std::floor(100 * fraction(state))));
}

// What stands right of the bar.
std::string numbers(const ProgressState& state) {
  std::string text = short_count(static_cast<double>(state.done));
  if (state.total > 0) text += "/" + short_count(static_cast<double>(state.total));
  text += fmt::format(" {}", state.unit);
  const auto in_this_run = static_cast<double>(state.done - state.first);
  const double rate = state.seconds > 0 ? in_this_run / state.seconds : 0;
  if (rate > 0) text += fmt::format("  {} {}/s", short_count(rate), state.unit);
  if (!state.detail.empty()) text += fmt::format("  {}", state.detail);
  if (state.total > 0 && state.done >= state.total) {
    text += fmt::format("  {}", clock_time(state.seconds));
  } else if (state.total > 0 && rate > 0) {
    text +=
        fmt::format("  {} left", clock_time(static_cast<double>(state.total - state.done) / rate));
  }
  return text;
}

int columns_of(FILE* terminal) {
  winsize size{};
  const bool known = ioctl(fileno(terminal), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

}  // namespace

std::string short_count(double count) {
  const char* suffix = "";
  for (const char* larger : {"k", "M", "G", "T"}) {
    if (count < 999.5) break;
    count /= 1000;
    suffix = larger;
  }
  const bool whole = count >= 99.95 || (*suffix == 0 && count == std::floor(count));
  return fmt::format("{:.{}f}{}", count, whole ? 0 : count >= 9.995 ? 1 : 2, suffix);
}

std::string clock_time(double seconds) {
  const auto total = static_cast<int64_t>(std::llround(std::clamp(seconds, 0.0, 1e9)));
  const int64_t hours = total / 3600, minutes = total / 60 % 60;
  if (hours > 0) return fmt::format("{}:{:02}:{:02}", hours, minutes, total % 60);
  return fmt::format("{}:{:02}", minutes, total % 60);
}

std::string progress_line(const ProgressState& state) {
  if (state.total <= 0) return fmt::format("{}  {}", state.label, numbers(state));
  return fmt::format("{} {}  {}", state.label, percent(state), numbers(state));
}

std::string progress_bar(const ProgressState& state, int columns) {
  const auto room = static_cast<size_t>(std::max(columns, 0));
  std::string line = progress_line(state);
  const int width = std::min(columns - static_cast<int>(line.size()) - 2, kLongestBar);
  if (state.total > 0 && width >= kShortestBar) {
    const auto filled = static_cast<size_t>(fraction(state) * width);
    std::string bar = std::string(filled, '=') + (state.done < state.total ? ">" : "");
    bar.resize(static_cast<size_t>(width), ' ');
    line = fmt::format("{} {} [{}] {}", state.label, percent(state), bar, numbers(state));
  }
  return line.substr(0, room);
}

Progress::Progress(std::string label, std::string unit, int64_t total, int64_t first, FILE* out)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      first_(first),
      done_(first),
      out_(out),
      terminal_(isatty(fileno(out)) == 1),
      next_draw_(terminal_ ? begin_ : begin_ + kPlainLine) {}

Progress::~Progress() {
  finish();
}

ProgressState Progress::state() const {
  const std::chrono::duration<double> elapsed = Clock::now() - begin_;
  return {label_, unit_, first_, done_, total_, elapsed.count(), detail_};
}

void Progress::draw() {
  if (terminal_) {
    // One column stays free: writing into the last one makes some terminals wrap. ESC [K clears
    // what a longer line left behind.
    fmt::print(out_, "\r{}\x1b[K", progress_bar(state(), columns_of(out_) - 1));
  } else {
    fmt::print(out_, "{}\n", progress_line(state()));
  }
  std::fflush(out_);
}

void Progress::update(int64_t done, std::string detail) {
  done_ = done;
  detail_ = std::move(detail);
  const Clock::time_point now = Clock::now();
  if (finished_ || now < next_draw_) return;
  draw();
  next_draw_ = now + (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kPlainLine));
}

void Progress::hide() {
  if (!terminal_ || finished_) return;
  fmt::print(out_, "\r\x1b[K");
  std::fflush(out_);
  next_draw_ = Clock::now();
}

void Progress::finish() {
  if (finished_) return;
  draw();
  if (terminal_) fmt::print(out_, "\n");
  std::fflush(out_);
  finished_ = true;
}

}  // namespace mamba3::cli
