#include "support/archives.h"

#include <zlib.h>

#include <cstdlib>

#include "support/files.h"

namespace mamba3::testing {

namespace {

std::string deflated(const std::string& content) {
  z_stream stream{};
  if (deflateInit2(&stream, 6, Z_DEFLATED, -MAX_WBITS, 9, Z_DEFAULT_STRATEGY) != Z_OK) std::abort();
  std::string out(deflateBound(&stream, content.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(content.data()));
  stream.avail_in = static_cast<uInt>(content.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  if (deflate(&stream, Z_FINISH) != Z_STREAM_END) std::abort();
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

template <typename... Fields>
std::string record(Fields... fields) {
  return (raw(fields) + ...);
}

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// What the central directory says of a part.
struct Placed {
  const ZipPart& part;
  std::string packed;
  u32 crc;
  u64 offset;

  u16 method() const { return part.deflate ? 8 : 0; }
  u16 name_size() const { return static_cast<u16>(part.name.size()); }

  std::string local() const {
    return record(u32{0x04034b50}, u16{45}, u16{0}, method(), u16{0}, u16{0}, crc,
                  static_cast<u32>(packed.size()), static_cast<u32>(part.content.size()),
                  name_size(), u16{0}) +
           part.name + packed;
  }

  std::string central(bool zip64) const {
    const u64 size = part.content.size(), packed_size = packed.size();
    const std::string extra = zip64 ? record(u16{1}, u16{24}, size, packed_size, offset) : "";
    const auto field = [&](u64 value) { return zip64 ? 0xffffffffu : static_cast<u32>(value); };
    return record(u32{0x02014b50}, u16{45}, u16{45}, u16{0}, method(), u16{0}, u16{0}, crc,
                  field(packed_size), field(size), name_size(), static_cast<u16>(extra.size()),
                  u16{0}, u16{0}, u16{0}, u32{0}, field(offset)) +
           part.name + extra;
  }
};

}  // namespace

std::string zip_of(const std::vector<ZipPart>& parts, bool zip64) {
  std::string file, directory;
  for (const ZipPart& part : parts) {
    const Placed placed{
        part, part.deflate ? deflated(part.content) : part.content,
        static_cast<u32>(
            crc32_z(0, reinterpret_cast<const Bytef*>(part.content.data()), part.content.size())),
        file.size()};
    file += placed.local();
    directory += placed.central(zip64);
  }
  const u64 begin = file.size(), count = parts.size(), size = directory.size();
  file += directory;
  if (zip64) {
    const u64 end = file.size();
    file += record(u32{0x06064b50}, u64{44}, u16{45}, u16{45}, u32{0}, u32{0}, count, count, size,
                   begin);
    file += record(u32{0x07064b50}, u32{0}, end, u32{1});
    return file + record(u32{0x06054b50}, u16{0}, u16{0}, u16{0xffff}, u16{0xffff}, ~u32{0},
                         ~u32{0}, u16{0});
  }
  return file + record(u32{0x06054b50}, u16{0}, u16{0}, static_cast<u16>(count),
                       static_cast<u16>(count), static_cast<u32>(size), static_cast<u32>(begin),
                       u16{0});
}

Pickle& Pickle::global(std::string_view module, std::string_view name) {
  return *this << "c" << module << "\n" << name << "\n";
}

Pickle& Pickle::string(std::string_view text) {
  return *this << "X" << raw(static_cast<uint32_t>(text.size())) << text;
}

Pickle& Pickle::integer(int64_t value) {
  return *this << "\x8a\x08" << raw(value);  // LONG1
}

Pickle& Pickle::tuple(const std::vector<int64_t>& values) {
  *this << "(";
  for (const int64_t value : values) integer(value);
  return *this << "t";
}

Pickle& Pickle::tensor_call(const TorchTensor& t) {
  static const auto storage_name = [](DType dtype) {
    switch (dtype) {
      case DType::f32:
        return "FloatStorage";
      case DType::bf16:
        return "BFloat16Storage";
      case DType::f16:
        return "HalfStorage";
      case DType::f64:
        return "DoubleStorage";
      case DType::i32:
        return "IntStorage";
      case DType::i64:
        return "LongStorage";
      case DType::u8:
        return "ByteStorage";
    }
    return "";
  };
  global("torch._utils", "_rebuild_tensor_v2") << "((";
  string("storage").global("torch", storage_name(t.dtype)).string(t.storage).string("cpu");
  integer(t.storage_size) << "tQ";
  integer(t.offset).tuple(t.dims).tuple(t.strides);
  *this << "\x89";
  return global("collections", "OrderedDict") << ")Rt";
}

std::string pickle_of(const std::vector<TorchTensor>& tensors) {
  Pickle pickle;
  pickle << "}(";
  for (const TorchTensor& tensor : tensors) pickle.string(tensor.name).tensor_call(tensor) << "R";
  return (pickle << "u").end();
}

std::string torch_file_of(const std::vector<TorchTensor>& tensors,
                          const std::vector<TorchStorage>& storages, bool deflate) {
  std::vector<ZipPart> parts = {{"model/data.pkl", pickle_of(tensors), deflate},
                                {"model/byteorder", "little", deflate}};
  for (const auto& [key, content] : storages) {
    parts.push_back({"model/data/" + key, content, deflate});
  }
  return zip_of(parts);
}

}  // namespace mamba3::testing
