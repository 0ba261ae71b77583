#include "formats/text_file.h"

#include <fstream>
#include <iterator>

#include "core/error.h"
#include "formats/atomic_file.h"

namespace mamba3 {

std::string read_text_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) input_error("cannot read {}", path.string());
  return {std::istreambuf_iterator<char>(in), {}};
}

void write_text_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace mamba3
