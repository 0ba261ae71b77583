#pragma once

#include <string>

namespace mamba3::cli {

// The whole content of a file, or of stdin for "-". Throws InputError if it cannot be read.
std::string read_text(const std::string& path);

}  // namespace mamba3::cli
