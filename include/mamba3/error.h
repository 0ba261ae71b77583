#pragma once

#include <stdexcept>
#include <string>

namespace mamba3 {

// Thrown by every function of the library for bad input or a failed operation. what() says what was
// wrong, where, what was expected and, where we know, what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The input itself (a file, a flag, a prompt, a shape) is at fault: programs exit with 2, and with
// 1 for any other Error.
class InputError : public Error {
 public:
  using Error::Error;
};

}  // namespace mamba3
