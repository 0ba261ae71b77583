#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mamba3 {

struct ZipEntry {
  std::string name;
  std::span<const std::byte> data;  // as it lies in the archive
  uint64_t size = 0;                // when unpacked
  uint32_t crc = 0;                 // of the unpacked content
  bool deflated = false;            // else stored: data is the content
};

// What an entry holds: in place for a stored entry, unpacked into memory of its own for a deflated
// one.
struct ZipContent {
  std::span<const std::byte> bytes;
  std::shared_ptr<const void> owner;  // null if in place
};

// A zip archive in memory, zip64 included. The constructor reads the directory and checks all of
// it: that every entry lies within the archive and overlaps no other, that names are unique, and
// that what is packed would not unpack to more than 16 times the archive (a zip bomb).
//
// Everything throws InputError that begins with `source`.
class ZipArchive {
 public:
  ZipArchive(std::span<const std::byte> bytes, std::string source);

  const std::vector<ZipEntry>& entries() const { return entries_; }
  const ZipEntry* find(std::string_view name) const;  // null if absent

  // Checks the content against its checksum.
  ZipContent read(const ZipEntry& entry) const;

 private:
  std::vector<ZipEntry> entries_;  // sorted by name
  std::string source_;
};

}  // namespace mamba3
