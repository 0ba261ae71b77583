#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace mamba3::testing {

struct ProgramResult {
  int exit_code = 0;  // 128 + the signal's number if one ended the program
  std::string out;    // stdout
  std::string err;    // stderr, which is not a terminal
};

// Called with the id of a process once it runs: to send it signals.
using WhileRunning = std::function<void(pid_t)>;

// Runs a program (its path and its arguments) with `input` on its stdin, and waits for it.
ProgramResult run_command(const std::vector<std::string>& command, std::string_view input = {},
                          const WhileRunning& while_running = {});
// Runs the built `mamba3` with these arguments.
ProgramResult run_program(const std::vector<std::string>& args, std::string_view input = {},
                          const WhileRunning& while_running = {});

}  // namespace mamba3::testing
