#include "cli/stop_signal.h"

#include <atomic>
#include <csignal>

namespace mamba3::cli {

namespace {

// Signals come on any thread, and other threads look.
std::atomic<int> stop_signal{0};
static_assert(std::atomic<int>::is_always_lock_free);

extern "C" void ask_to_stop(int signal) {
  stop_signal = signal;
  std::signal(signal, SIG_DFL);
}

}  // namespace

void catch_stop_signals() {
  stop_signal = 0;
  std::signal(SIGINT, ask_to_stop);
  std::signal(SIGTERM, ask_to_stop);
}

bool stop_asked() {
  return stop_signal != 0;
}

void end_by_stop_signal() {
  std::signal(stop_signal, SIG_DFL);
  std::raise(stop_signal);
}

}  // namespace mamba3::cli
