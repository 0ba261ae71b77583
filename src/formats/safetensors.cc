#include "formats/safetensors.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "core/error.h"
#include "formats/atomic_file.h"
#include "formats/bytes.h"
#include "formats/mapped_file.h"

namespace mamba3 {

namespace {

using Json = nlohmann::json;

constexpr size_t kLengthBytes = 8;
// Hundreds of thousands of tensors: guards against a corrupted length.
constexpr uint64_t kMaxHeader = 32 << 20;
constexpr int kMaxDepth = 2;  // of a shape within a tensor within the header
constexpr std::string_view kMetadata = "__metadata__";

constexpr std::array<std::pair<std::string_view, DType>, 7> kDTypes{{
    {"F32", DType::f32},
    {"BF16", DType::bf16},
    {"F16", DType::f16},
    {"F64", DType::f64},
    {"I32", DType::i32},
    {"I64", DType::i64},
    {"U8", DType::u8},
}};

// Where a tensor's data are, relative to the end of the header.
struct Range {
  uint64_t begin = 0, end = 0;
  std::string name;
};

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
         std::string_view source)
      : bytes_(bytes), owner_(std::move(owner)), source_(source) {}

  TensorFile read() {
    const std::string_view header = header_text();
    data_ = bytes_.subspan(kLengthBytes + header.size());
    const Json json = parse(header);
    TensorFile file;
    for (const auto& [name, value] : json.items()) {
      if (name == kMetadata) {
        file.metadata = metadata(value);
      } else {
        file.tensors.push_back(tensor(name, value));
      }
    }
    check_ranges();
    sort_by_data(file.tensors);
    for (StoredTensor& t : file.tensors) t = make_dense(std::move(t));
    return file;
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    input_error("{}: {}", source_, fmt::format(format, std::forward<Args>(args)...));
  }

  std::string_view header_text() const {
    if (bytes_.size() < kLengthBytes) {
      fail("{} bytes are too few for a safetensors file", bytes_.size());
    }
    const auto length = load_le<uint64_t>(bytes_, 0);
    if (length > kMaxHeader) {
      fail("the header's length, {}, is above {}: not a safetensors file, or damaged", length,
           kMaxHeader);
    }
    if (length > bytes_.size() - kLengthBytes) {
      fail("the header has {} bytes, but only {} are there: the file is truncated", length,
           bytes_.size() - kLengthBytes);
    }
    return {reinterpret_cast<const char*>(bytes_.data()) + kLengthBytes, length};
  }

  Json parse(std::string_view header) const {
    // The JSON library keeps the last of equal names; here the second is an error.
    std::set<std::string> names;
    const auto callback = [&](int depth, Json::parse_event_t event, Json& value) {
      using Event = Json::parse_event_t;
      if (event == Event::key && depth == 1 && !names.insert(value.get<std::string>()).second) {
        fail("there are two tensors {:?}", value.get<std::string>());
      }
      if (depth > kMaxDepth && (event == Event::object_start || event == Event::array_start)) {
        fail("the header is nested too deeply");
      }
      return true;
    };
    Json json;
    try {
      json = Json::parse(header, callback);
    } catch (const Json::exception& exception) {
      fail("the header is not valid JSON: {}", exception.what());
    }
    if (!json.is_object()) fail("the header must be a JSON object");
    return json;
  }

  std::map<std::string, std::string> metadata(const Json& json) const {
    std::map<std::string, std::string> result;
    const bool strings = json.is_object() && std::all_of(json.begin(), json.end(), [](auto& value) {
                           return value.is_string();
                         });
    if (!strings) fail("{} must be an object of strings", kMetadata);
    for (const auto& [key, value] : json.items()) result[key] = value.template get<std::string>();
    return result;
  }

  StoredTensor tensor(const std::string& name, const Json& json) {
    if (!json.is_object()) fail("the entry of {:?} must be an object", name);
    const DType dtype = dtype_of(name, member(name, json, "dtype"));
    const std::vector<uint64_t> shape = integers(name, member(name, json, "shape"), "shape");
    const std::vector<uint64_t> offsets =
        integers(name, member(name, json, "data_offsets"), "data_offsets");
    if (offsets.size() != 2 || offsets[0] > offsets[1]) {
      fail("data_offsets of {:?} must be [begin, end] with begin <= end", name);
    }
    if (offsets[1] > data_.size()) {
      fail("{:?} ends at byte {} of the data, which have only {}: the file is truncated or damaged",
           name, offsets[1], data_.size());
    }
    const std::vector<int64_t> dims(shape.begin(), shape.end());
    const std::optional<int64_t> bytes = dense_bytes(dims, dtype);
    if (!bytes) fail("the shape of {:?} is too large or has more than {} dims", name, kMaxRank);
    if (static_cast<uint64_t>(*bytes) != offsets[1] - offsets[0]) {
      fail("{:?} has {} bytes of data, but its shape and dtype need {}", name,
           offsets[1] - offsets[0], *bytes);
    }
    ranges_.push_back({offsets[0], offsets[1], name});
    auto* data = const_cast<std::byte*>(data_.data()) + offsets[0];
    return {name, make_view(data, dtype, dims), owner_};
  }

  const Json& member(const std::string& name, const Json& json, const char* key) const {
    const auto found = json.find(key);
    if (found == json.end()) fail("the entry of {:?} has no {}", name, key);
    return *found;
  }

  DType dtype_of(const std::string& name, const Json& json) const {
    const std::string text = json.is_string() ? json.get<std::string>() : json.dump();
    for (const auto& [file_name, dtype] : kDTypes) {
      if (text == file_name) return dtype;
    }
    fail(
        "the dtype of {:?} is {:?}, which is not supported (F32, BF16, F16, F64, I32, I64 and U8 "
        "are)",
        name, text);
  }

  // Non-negative integers that fit int64.
  std::vector<uint64_t> integers(const std::string& name, const Json& json,
                                 std::string_view key) const {
    const bool fits =
        json.is_array() && std::all_of(json.begin(), json.end(), [](auto& value) {
          return value.is_number_unsigned() && value.template get<uint64_t>() <= INT64_MAX;
        });
    if (!fits) fail("{} of {:?} must be an array of non-negative integers", key, name);
    return json.get<std::vector<uint64_t>>();
  }

  // As the format demands, tensors neither overlap nor leave gaps, and end with the file.
  void check_ranges() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    uint64_t end = 0;
    std::string_view before = "the header";
    for (const Range& range : ranges_) {
      if (range.begin < end) fail("{:?} overlaps {:?}", range.name, before);
      if (range.begin > end) fail("{} unused bytes before {:?}", range.begin - end, range.name);
      end = range.end;
      before = range.name;
    }
    if (end != data_.size()) fail("{} unused bytes at the end", data_.size() - end);
  }

  static void sort_by_data(std::vector<StoredTensor>& tensors) {
    std::stable_sort(
        tensors.begin(), tensors.end(),
        [](const StoredTensor& a, const StoredTensor& b) { return a.view.data < b.view.data; });
  }

  std::span<const std::byte> bytes_, data_;
  std::shared_ptr<const void> owner_;
  std::string_view source_;
  std::vector<Range> ranges_;
};

std::string_view file_name_of(DType dtype) {
  const auto found = std::find_if(kDTypes.begin(), kDTypes.end(),
                                  [&](const auto& entry) { return entry.second == dtype; });
  assert(found != kDTypes.end());
  return found->first;
}

std::vector<NamedView> larger_elements_first(std::span<const NamedView> tensors) {
  std::vector<NamedView> sorted(tensors.begin(), tensors.end());
  std::stable_sort(sorted.begin(), sorted.end(), [](const NamedView& a, const NamedView& b) {
    return size_of(a.view.dtype) > size_of(b.view.dtype);
  });
  return sorted;
}

std::string header_of(std::span<const NamedView> tensors,
                      const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[std::string(kMetadata)] = metadata;
  int64_t begin = 0;
  for (const auto& [name, view] : tensors) {
    if (json.contains(name)) error("[write_safetensors] there are two tensors {:?}", name);
    const int64_t end = begin + view.bytes();
    const auto* dims = view.dims.data();
    json[name] = {{"dtype", file_name_of(view.dtype)},
                  {"shape", std::vector<int64_t>(dims, dims + view.rank)},
                  {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string header = json.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  return header;
}

}  // namespace

TensorFile read_safetensors(const std::filesystem::path& path) {
  const auto file = std::make_shared<const MappedFile>(path);
  return read_safetensors(file->bytes(), file, path.string());
}

TensorFile read_safetensors(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                            std::string_view source) {
  return Reader(bytes, std::move(owner), source).read();
}

void write_safetensors(AtomicFile& file, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  for (const auto& [name, view] : tensors) {
    if (!view.contiguous()) error("[write_safetensors] {:?} must be contiguous", name);
  }
  const std::vector<NamedView> sorted = larger_elements_first(tensors);
  const std::string header = header_of(sorted, metadata);
  const uint64_t length = header.size();
  file.write(&length, sizeof(length));
  file.write(header);
  for (const auto& [name, view] : sorted) {
    file.write(view.data, static_cast<size_t>(view.bytes()));
  }
}

void write_safetensors(const std::filesystem::path& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  AtomicFile file(path);
  write_safetensors(file, tensors, metadata);
  file.commit();
}

}  // namespace mamba3
