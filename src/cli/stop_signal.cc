#include "cli/stop_signal.h"

#include <pthread.h>

#include <atomic>
#include <csignal>
#include <mutex>
#include <thread>

namespace mamba3::cli {

namespace {

// What the thread that waits saw, and others look at.
std::atomic<int> stop_signal{0};

sigset_t stop_signals() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGTERM);
  return set;
}

// Of the calling thread.
void end_by(int signal) {
  std::signal(signal, SIG_DFL);
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  std::raise(signal);
}

void wait_for_signals() {
  const sigset_t set = stop_signals();
  for (;;) {
    int signal = 0;
    sigwait(&set, &signal);
    if (stop_signal.exchange(signal) != 0) end_by(signal);
  }
}

}  // namespace

// No handler: it would run on the stack of a thread that computes, and kernels of oneDNN put the
// stack pointer into a small buffer of theirs, beyond which it would write. Instead all threads
// that are made from here on leave the signals to one that waits for them.
void catch_stop_signals() {
  stop_signal = 0;
  const sigset_t set = stop_signals();
  pthread_sigmask(SIG_BLOCK, &set, nullptr);
  static std::once_flag started;
  std::call_once(started, [] { std::thread(wait_for_signals).detach(); });
}

bool stop_asked() {
  return stop_signal != 0;
}

void end_by_stop_signal() {
  end_by(stop_signal);
}

}  // namespace mamba3::cli
