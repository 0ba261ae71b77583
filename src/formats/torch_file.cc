#include "formats/torch_file.h"

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "formats/mapped_file.h"
#include "formats/torch_pickle.h"
#include "formats/zip.h"

namespace mamba3 {

namespace {

constexpr std::string_view kPickleName = "/data.pkl";
constexpr uint64_t kMaxPickle = 16 << 20;  // names of a hundred thousand tensors

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
         std::string_view source)
      : owner_(std::move(owner)), source_(source), archive_(bytes, std::string(source)) {}

  TensorFile read() {
    const ZipEntry& pickle = find_pickle();
    const std::string folder = pickle.name.substr(0, pickle.name.size() - kPickleName.size());
    check_byte_order(folder + "/byteorder");
    TensorFile file;
    for (TorchTensor& t : unpickle_state_dict(archive_.read(pickle).bytes, source_)) {
      file.tensors.push_back(tensor(folder + "/data/" + t.storage, t));
    }
    return file;
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    input_error("{}: {}", source_, fmt::format(format, std::forward<Args>(args)...));
  }

  const ZipEntry& find_pickle() const {
    const ZipEntry* pickle = nullptr;
    for (const ZipEntry& entry : archive_.entries()) {
      if (!entry.name.ends_with(kPickleName)) continue;
      if (pickle != nullptr) fail("has both {:?} and {:?}", pickle->name, entry.name);
      pickle = &entry;
    }
    if (pickle == nullptr) fail("has no data.pkl: it is a zip archive, but not torch's");
    if (pickle->size > kMaxPickle) {
      fail("{:?} has {} bytes, more than the {} that a state dict may have", pickle->name,
           pickle->size, kMaxPickle);
    }
    return *pickle;
  }

  void check_byte_order(const std::string& name) const {
    const ZipEntry* entry = archive_.find(name);
    if (entry == nullptr || entry->size > kMaxPickle) return;  // older versions write none
    const ZipContent content = archive_.read(*entry);
    const std::string_view order(reinterpret_cast<const char*>(content.bytes.data()),
                                 content.bytes.size());
    if (order != "little") fail("its byte order is {:?}, only \"little\" is supported", order);
  }

  // Read, unpacked if need be, and checked once, however many tensors share it.
  const ZipContent& storage(const std::string& name, const TorchTensor& t) {
    const auto known = storages_.find(name);
    if (known != storages_.end()) return known->second;
    const ZipEntry* entry = archive_.find(name);
    if (entry == nullptr) fail("the data of {:?}, {:?}, are missing", t.name, name);
    ZipContent content = archive_.read(*entry);
    if (content.owner == nullptr) content.owner = owner_;
    return storages_.emplace(name, std::move(content)).first->second;
  }

  StoredTensor tensor(const std::string& storage_name, TorchTensor& t) {
    const ZipContent& content = storage(storage_name, t);
    const int64_t element = size_of(t.dtype);
    if (content.bytes.size() != static_cast<uint64_t>(t.storage_size * element)) {
      fail("the data of {:?} have {} bytes, but {} elements of {} need {}", t.name,
           content.bytes.size(), t.storage_size, name_of(t.dtype), t.storage_size * element);
    }
    auto* data = const_cast<std::byte*>(content.bytes.data()) + t.offset * element;
    View view = make_view(data, t.dtype, t.dims);
    std::copy(t.strides.begin(), t.strides.end(), view.strides.begin());
    if (!is_dense(view)) count_copy(view);
    return make_dense({std::move(t.name), view, content.owner});
  }

  // Copies of many strided views of one storage could need far more memory than the file.
  void count_copy(const View& view) {
    uint64_t limit = 0;
    for (const ZipEntry& entry : archive_.entries()) limit += 2 * entry.size;
    copied_ += static_cast<uint64_t>(view.bytes());
    if (copied_ > limit) fail("its strided tensors need more than twice the memory of the file");
  }

  std::shared_ptr<const void> owner_;
  std::string_view source_;
  ZipArchive archive_;
  uint64_t copied_ = 0;
  std::map<std::string, ZipContent> storages_;
};

// What can be told about a file that is not a zip archive.
void check_is_zip(std::span<const std::byte> bytes, std::string_view source) {
  const std::string_view start(reinterpret_cast<const char*>(bytes.data()),
                               std::min<size_t>(bytes.size(), 2));
  if (start == "\x80\x02") {
    input_error(
        "{}: in the format of torch before 1.6: load it with a newer torch and save it again",
        source);
  }
  if (start != "PK") input_error("{}: not a file that torch.save wrote", source);
}

}  // namespace

TensorFile read_torch(const std::filesystem::path& path) {
  const auto file = std::make_shared<const MappedFile>(path);
  return read_torch(file->bytes(), file, path.string());
}

TensorFile read_torch(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                      std::string_view source) {
  check_is_zip(bytes, source);
  return Reader(bytes, std::move(owner), source).read();
}

}  // namespace mamba3
