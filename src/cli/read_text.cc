#include "cli/read_text.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "core/error.h"

namespace mamba3::cli {

namespace {

std::string read_all(FILE* in, const std::string& name) {
  std::string text;
  char buffer[1 << 16];
  while (const size_t n = std::fread(buffer, 1, sizeof(buffer), in)) text.append(buffer, n);
  if (std::ferror(in)) input_error("cannot read {}: {}", name, std::strerror(errno));
  return text;
}

}  // namespace

std::string read_text(const std::string& path) {
  if (path == "-") return read_all(stdin, "standard input");
  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) input_error("cannot open {}: {}", path, std::strerror(errno));
  return read_all(file.get(), path);
}

}  // namespace mamba3::cli
