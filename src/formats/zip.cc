#include "formats/zip.h"

#include <zlib.h>

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "formats/bytes.h"

namespace mamba3 {

namespace {

// Signatures, fixed sizes and field offsets: APPNOTE.TXT, the format's specification, sections 4.3
// and 4.5.
constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kCentralSignature = 0x02014b50;
constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kEnd64Signature = 0x06064b50;
constexpr uint32_t kLocator64Signature = 0x07064b50;
constexpr size_t kLocalSize = 30;
constexpr size_t kCentralSize = 46;
constexpr size_t kEndSize = 22;
constexpr size_t kEnd64Size = 56;
constexpr size_t kLocator64Size = 20;
constexpr size_t kMaxComment = 0xffff;

constexpr uint16_t kEncrypted = 1;
constexpr uint16_t kStored = 0;
constexpr uint16_t kDeflated = 8;
constexpr uint16_t kZip64Extra = 1;
constexpr uint32_t kIn64Bits = 0xffffffff;  // the field's value is in the zip64 extra

// Weights hardly shrink when packed, so what claims to unpack to more than this is an attack.
constexpr uint64_t kMaxRatio = 16;
constexpr uint64_t kRatioFreeBytes = 16 << 20;

// An entry's span in the archive, header included.
struct Extent {
  uint64_t begin = 0, end = 0;
  std::string_view name;
};

class DirectoryReader {
 public:
  DirectoryReader(std::span<const std::byte> bytes, std::string_view source)
      : bytes_(bytes), source_(source) {}

  std::vector<ZipEntry> read() {
    find_directory();
    std::vector<ZipEntry> entries;
    std::vector<Extent> extents;
    entries.reserve(count_);  // find_directory() has bounded it; keeps the names in place
    size_t at = begin_;
    for (uint64_t i = 0; i < count_; ++i) at = read_entry(at, entries, extents);
    check_overlaps(extents);
    check_ratio(entries);
    check_names(entries);
    return entries;
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    input_error("{}: {}", source_, fmt::format(format, std::forward<Args>(args)...));
  }

  // [at, at + size) lies within the archive.
  bool inside(uint64_t at, uint64_t size) const {
    return at <= bytes_.size() && size <= bytes_.size() - at;
  }

  std::string_view text(size_t at, size_t size) const {
    return {reinterpret_cast<const char*>(bytes_.data()) + at, size};
  }

  // The end record, behind which there is only a comment of the length that it states.
  size_t find_end() const {
    const size_t last = bytes_.size() < kEndSize ? 0 : bytes_.size() - kEndSize;
    const size_t first = last > kMaxComment ? last - kMaxComment : 0;
    for (size_t at = last + 1; at-- > first;) {
      if (inside(at, kEndSize) && load_le<uint32_t>(bytes_, at) == kEndSignature &&
          load_le<uint16_t>(bytes_, at + 20) == bytes_.size() - at - kEndSize) {
        return at;
      }
    }
    fail("no end of a zip archive: the file is truncated, or is no zip archive");
  }

  void find_directory() {
    const size_t end = find_end();
    uint64_t size = load_le<uint32_t>(bytes_, end + 12);
    uint64_t begin = load_le<uint32_t>(bytes_, end + 16);
    uint64_t disks = load_le<uint16_t>(bytes_, end + 4);
    size_t directory_end = end;
    count_ = load_le<uint16_t>(bytes_, end + 10);
    if (end >= kLocator64Size &&
        load_le<uint32_t>(bytes_, end - kLocator64Size) == kLocator64Signature) {
      const auto end64 = load_le<uint64_t>(bytes_, end - kLocator64Size + 8);
      if (!inside(end64, kEnd64Size) || load_le<uint32_t>(bytes_, end64) != kEnd64Signature) {
        fail("the zip64 end record is not where it should be: the file is damaged");
      }
      disks = load_le<uint32_t>(bytes_, end64 + 16);
      count_ = load_le<uint64_t>(bytes_, end64 + 32);
      size = load_le<uint64_t>(bytes_, end64 + 40);
      begin = load_le<uint64_t>(bytes_, end64 + 48);
      directory_end = end64;
    }
    if (disks != 0) fail("zip archives of several volumes are not supported");
    if (begin > directory_end || size > directory_end - begin || count_ > size / kCentralSize) {
      fail("the zip directory does not fit into the file: the file is damaged");
    }
    begin_ = begin;
    end_ = begin + size;
  }

  // Reads the directory's entry at `at` and returns where the next one is.
  size_t read_entry(size_t at, std::vector<ZipEntry>& entries, std::vector<Extent>& extents) const {
    if (end_ - at < kCentralSize || load_le<uint32_t>(bytes_, at) != kCentralSignature) {
      fail("the zip directory is damaged");
    }
    const size_t name_size = load_le<uint16_t>(bytes_, at + 28);
    const size_t extra_size = load_le<uint16_t>(bytes_, at + 30);
    const size_t next =
        at + kCentralSize + name_size + extra_size + load_le<uint16_t>(bytes_, at + 32);
    if (next > end_) fail("the zip directory is damaged");

    ZipEntry& entry = entries.emplace_back();
    entry.name = text(at + kCentralSize, name_size);
    entry.crc = load_le<uint32_t>(bytes_, at + 16);
    uint64_t packed = load_le<uint32_t>(bytes_, at + 20);
    entry.size = load_le<uint32_t>(bytes_, at + 24);
    uint64_t offset = load_le<uint32_t>(bytes_, at + 42);
    read_zip64_extra(bytes_.subspan(at + kCentralSize + name_size, extra_size),
                     {&entry.size, &packed, &offset}, entry.name);

    const auto method = load_le<uint16_t>(bytes_, at + 10);
    if ((load_le<uint16_t>(bytes_, at + 8) & kEncrypted) != 0)
      fail("{:?} is encrypted", entry.name);
    if (method != kStored && method != kDeflated) {
      fail("{:?} is packed with method {}: only stored and deflated entries are supported",
           entry.name, method);
    }
    entry.deflated = method == kDeflated;
    if (!entry.deflated && packed != entry.size) fail("the sizes of {:?} disagree", entry.name);
    entry.data = bytes_.subspan(data_begin(entry.name, offset, packed), packed);
    extents.push_back({offset, offset_of(entry.data) + packed, entry.name});
    return next;
  }

  // Replaces those of the values, in this order, that say so by their 64-bit ones.
  void read_zip64_extra(std::span<const std::byte> extra, std::initializer_list<uint64_t*> values,
                        std::string_view name) const {
    std::span<const std::byte> field;
    for (size_t at = 0; extra.size() - at >= 4;) {
      const size_t size = load_le<uint16_t>(extra, at + 2);
      if (size > extra.size() - at - 4) break;
      if (load_le<uint16_t>(extra, at) == kZip64Extra) field = extra.subspan(at + 4, size);
      at += 4 + size;
    }
    for (uint64_t* value : values) {
      if (*value != kIn64Bits) continue;
      if (field.size() < 8) fail("{:?} lacks its zip64 sizes", name);
      *value = load_le<uint64_t>(field, 0);
      field = field.subspan(8);
    }
  }

  // Where the data begin: behind the local header at `offset`, which must be of the same entry.
  uint64_t data_begin(std::string_view name, uint64_t offset, uint64_t packed) const {
    if (!inside(offset, kLocalSize) || load_le<uint32_t>(bytes_, offset) != kLocalSignature) {
      fail("{:?} is not where the zip directory says: the file is damaged", name);
    }
    const uint64_t name_size = load_le<uint16_t>(bytes_, offset + 26);
    const uint64_t begin = offset + kLocalSize + name_size + load_le<uint16_t>(bytes_, offset + 28);
    if (!inside(begin, packed) || begin + packed > begin_) {
      fail("{:?} does not fit into the file: the file is damaged", name);
    }
    if (text(offset + kLocalSize, name_size) != name) {
      fail("{:?} has another name in the zip directory: {:?}", text(offset + kLocalSize, name_size),
           name);
    }
    return begin;
  }

  uint64_t offset_of(std::span<const std::byte> data) const {
    return static_cast<uint64_t>(data.data() - bytes_.data());
  }

  void check_overlaps(std::vector<Extent>& extents) const {
    std::sort(extents.begin(), extents.end(),
              [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < extents.size(); ++i) {
      if (extents[i].begin < extents[i - 1].end) {
        fail("{:?} overlaps {:?}", extents[i].name, extents[i - 1].name);
      }
    }
  }

  void check_ratio(const std::vector<ZipEntry>& entries) const {
    const uint64_t limit = kRatioFreeBytes + kMaxRatio * bytes_.size();
    uint64_t total = 0;
    for (const ZipEntry& entry : entries) {
      if (!entry.deflated) continue;
      if (entry.size > limit || (total += entry.size) > limit) {
        fail("would unpack to more than {} bytes, {} times its size: a zip bomb?", limit,
             kMaxRatio);
      }
    }
  }

  void check_names(std::vector<ZipEntry>& entries) const {
    std::sort(entries.begin(), entries.end(),
              [](const ZipEntry& a, const ZipEntry& b) { return a.name < b.name; });
    const auto twice =
        std::adjacent_find(entries.begin(), entries.end(),
                           [](const ZipEntry& a, const ZipEntry& b) { return a.name == b.name; });
    if (twice != entries.end()) fail("there are two entries {:?}", twice->name);
  }

  std::span<const std::byte> bytes_;
  std::string_view source_;
  size_t begin_ = 0, end_ = 0;  // of the directory
  uint64_t count_ = 0;          // of its entries
};

// Unpacks `data` to exactly `out`. False if the data are damaged, or hold less or more.
bool inflate_to(std::span<const std::byte> data, std::span<std::byte> out) {
  constexpr size_t kPiece = 1 << 30;  // zlib counts in 32 bits
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) error("zlib cannot start");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(data.data()));
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  size_t in_left = data.size(), out_left = out.size();
  int status = Z_OK;
  while (status == Z_OK) {
    const auto in = static_cast<uInt>(std::min(in_left, kPiece));
    const auto room = static_cast<uInt>(std::min(out_left, kPiece));
    stream.avail_in = in;
    stream.avail_out = room;
    status = inflate(&stream, Z_NO_FLUSH);
    in_left -= in - stream.avail_in;
    out_left -= room - stream.avail_out;
  }
  inflateEnd(&stream);
  return status == Z_STREAM_END && in_left == 0 && out_left == 0;
}

uint32_t crc_of(std::span<const std::byte> bytes) {
  return static_cast<uint32_t>(
      crc32_z(0, reinterpret_cast<const Bytef*>(bytes.data()), bytes.size()));
}

}  // namespace

ZipArchive::ZipArchive(std::span<const std::byte> bytes, std::string source)
    : source_(std::move(source)) {
  entries_ = DirectoryReader(bytes, source_).read();
}

const ZipEntry* ZipArchive::find(std::string_view name) const {
  const auto found =
      std::lower_bound(entries_.begin(), entries_.end(), name,
                       [](const ZipEntry& entry, std::string_view n) { return entry.name < n; });
  return found == entries_.end() || found->name != name ? nullptr : &*found;
}

ZipContent ZipArchive::read(const ZipEntry& entry) const {
  ZipContent content{.bytes = entry.data, .owner = nullptr};
  if (entry.deflated) {
    // Never empty, for zlib wants a place to write to.
    const auto memory = std::make_shared<std::vector<std::byte>>(entry.size + 1);
    const std::span<std::byte> unpacked(memory->data(), entry.size);
    if (!inflate_to(entry.data, unpacked)) {
      input_error("{}: {:?} cannot be unpacked: the file is damaged", source_, entry.name);
    }
    content = {.bytes = unpacked, .owner = memory};
  }
  if (crc_of(content.bytes) != entry.crc) {
    input_error(
        "{}: the checksum of {:?} does not match: the file is damaged (or was written by torch "
        "with checksums switched off: save it again with them)",
        source_, entry.name);
  }
  return content;
}

}  // namespace mamba3
