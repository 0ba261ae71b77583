#pragma once

#include <string>

#include "core/error.h"

namespace mamba3::testing {

// The message of the InputError that body throws, or what came instead:
//   EXPECT_EQ(input_error_of([&] { rms_norm(ctx, args); }), "[rms_norm] weight is missing");
template <typename Body>
std::string input_error_of(Body&& body) {
  try {
    body();
  } catch (const InputError& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("not an InputError: ") + error.what();
  }
  return "nothing thrown";
}

// The same for an Error that is not an InputError.
template <typename Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const InputError& error) {
    return std::string("an InputError: ") + error.what();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("not an Error: ") + error.what();
  }
  return "nothing thrown";
}

}  // namespace mamba3::testing
