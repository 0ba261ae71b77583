#pragma once

namespace mamba3::cli {

// What the program returns. A signal ends it with the shell's 128 + number (130 for Ctrl-C), except
// where a command saves its work first.
enum ExitCode : int {
  kSuccess = 0,
  kFailure = 1,   // the input was fine, the work failed: disk full, out of memory
  kBadInput = 2,  // a flag, a file, a prompt
};

}  // namespace mamba3::cli
