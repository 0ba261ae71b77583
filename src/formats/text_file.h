#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace mamba3 {

// The bytes of a file. Throws InputError that names a file that cannot be opened.
std::string read_text_file(const std::filesystem::path& path);

// Replaces the file as AtomicFile does: whole or not at all. Throws Error.
void write_text_file(const std::filesystem::path& path, std::string_view text);

}  // namespace mamba3
