#pragma once

#include <cstddef>
#include <filesystem>
#include <string_view>

namespace mamba3 {

// Writes a file so that whatever happens, a full disk, a crash, a cut of power, `path` holds either
// what it held before or all of the new content: into a temporary file beside it, which commit()
// flushes to the disk and renames. Without commit() the temporary file is removed.
//
// Files that belong together: write and sync() all of them, then commit() all.
class AtomicFile {
 public:
  // Every function throws Error with the path and the system's reason.
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t size);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void sync();    // all that was written is on the disk; a second call does nothing
  void commit();  // syncs, then puts the file in its place

 private:
  [[noreturn]] void fail(std::string_view what) const;

  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
};

}  // namespace mamba3
