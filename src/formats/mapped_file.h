#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace mamba3 {

// A whole file mapped read-only. Pages are read when touched and shared with other processes. The
// file must not shrink while it is mapped.
class MappedFile {
 public:
  // Throws InputError if there is no regular file to read at `path`.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace mamba3
