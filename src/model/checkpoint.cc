#include "model/checkpoint.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <span>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "core/threads.h"
#include "formats/atomic_file.h"
#include "formats/mapped_file.h"
#include "formats/safetensors.h"
#include "formats/shard_index.h"
#include "formats/torch_file.h"

namespace mamba3 {

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "config.json";
constexpr const char* kSafetensorsFile = "model.safetensors";
constexpr const char* kTorchFile = "pytorch_model.bin";
constexpr const char* kIndexSuffix = ".index.json";
constexpr size_t kMaxConfig = 1 << 20;
constexpr size_t kMaxIndex = 64 << 20;
constexpr size_t kMaxListed = 5;  // names in one message

constexpr std::string_view kEmbedding = "backbone.embedding.weight";
constexpr std::string_view kHead = "lm_head.weight";

// Without the exceptions of the standard library's: what cannot be looked at is not there.
bool is_there(const fs::path& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

bool is_folder(const fs::path& path) {
  std::error_code ignored;
  return fs::is_directory(path, ignored);
}

std::string read_text(const fs::path& path, size_t limit) {
  const MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() > limit) {
    input_error("{}: has {} bytes, more than the {} that it may have", path.string(), bytes.size(),
                limit);
  }
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// "a, b, c, d, e and 3 more"
std::string list_of(const std::vector<std::string>& names) {
  const auto shown = std::min(names.size(), kMaxListed);
  std::string text = fmt::format(
      "{}", fmt::join(names.begin(), names.begin() + static_cast<ptrdiff_t>(shown), ", "));
  if (names.size() > shown) text += fmt::format(" and {} more", names.size() - shown);
  return text;
}

std::string count_of(size_t n) {
  return n == 1 ? "1 tensor" : fmt::format("{} tensors", n);
}

// NaN and infinity have all bits of the exponent set.
template <typename Bits>
int64_t count_exponent(const void* data, Bits exponent, ThreadPool& threads, int64_t n) {
  constexpr int64_t kGrain = 1 << 20;
  std::atomic<int64_t> total{0};
  threads.parallel_for(n, kGrain, [&](int64_t begin, int64_t end, int) {
    const auto* bits = static_cast<const Bits*>(data);
    uint32_t count = 0;  // of the width of a vector's lane
    for (int64_t i = begin; i < end; ++i) count += (bits[i] & exponent) == exponent;
    total += count;
  });
  return total;
}

int64_t count_non_finite(const View& view, ThreadPool& threads) {
  switch (view.dtype) {
    case DType::f32:
      return count_exponent<uint32_t>(view.data, 0x7f800000u, threads, view.size());
    case DType::bf16:
      return count_exponent<uint16_t>(view.data, 0x7f80u, threads, view.size());
    case DType::f16:
      return count_exponent<uint16_t>(view.data, 0x7c00u, threads, view.size());
    default:
      return 0;  // there are no other weights
  }
}

bool same_values(const View& a, const View& b) {
  return a.dtype == b.dtype && a.shape() == b.shape() &&
         (a.data == b.data || std::memcmp(a.data, b.data, static_cast<size_t>(a.bytes())) == 0);
}

StoredTensor to_f32(const StoredTensor& tensor) {
  const View& view = tensor.view;
  const auto memory = std::make_shared<std::vector<float>>(static_cast<size_t>(view.size()));
  to_float(view.data, view.dtype, memory->data(), view.size());
  const std::span dims(view.dims.data(), static_cast<size_t>(view.rank));
  return {tensor.name, make_view(memory->data(), DType::f32, dims), memory};
}

// The matrix with rows of zeros added.
StoredTensor padded(const StoredTensor& tensor, int64_t rows) {
  const View& view = tensor.view;
  const std::array<int64_t, 2> dims{rows, view.dim(1)};
  const auto bytes = static_cast<size_t>(rows * view.dim(1) * size_of(view.dtype));
  const auto memory = std::make_shared<std::vector<std::byte>>(bytes);
  std::memcpy(memory->data(), view.data, static_cast<size_t>(view.bytes()));
  return {tensor.name, make_view(memory->data(), view.dtype, dims), memory};
}

class Loader {
 public:
  Loader(const fs::path& folder, std::string_view decay_act) : folder_(folder) {
    const fs::path config = folder / kConfigFile;
    if (!is_folder(folder)) {
      input_error(
          "{}: {}", folder.string(),
          is_there(folder) ? "is a file, but a checkpoint is a folder" : "there is no such folder");
    }
    if (!is_there(config)) {
      input_error("{}: has no {}: a checkpoint folder holds it and {} or {}", folder.string(),
                  kConfigFile, kSafetensorsFile, kTorchFile);
    }
    checkpoint_.config = parse_config(read_text(config, kMaxConfig), config.string(), decay_act);
  }

  Checkpoint load() {
    read_weights();
    const std::vector<TensorSpec> table = parameter_table(checkpoint_.config);
    check_complete(table);
    check_tied_head();
    for (const TensorSpec& spec : table) take(spec);
    warn_of_non_finite();
    return std::move(checkpoint_);
  }

 private:
  using Read = TensorFile (*)(const fs::path&);

  template <typename... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    input_error("{}: {}", weights_.string(), fmt::format(format, std::forward<Args>(args)...));
  }

  const Config& config() const { return checkpoint_.config; }

  void read_weights() {
    for (const auto& [name, read] :
         {std::pair<std::string, Read>{kSafetensorsFile, read_safetensors},
          std::pair<std::string, Read>{kTorchFile, read_torch}}) {
      if (weights_ = folder_ / name; is_there(weights_)) return add(read(weights_));
      if (weights_ = folder_ / (name + kIndexSuffix); is_there(weights_)) return read_shards(read);
    }
    input_error("{}: has no weights: {} or {}, or one of their index files ({}{})",
                folder_.string(), kSafetensorsFile, kTorchFile, kSafetensorsFile, kIndexSuffix);
  }

  void read_shards(Read read) {
    const auto index = parse_shard_index(read_text(weights_, kMaxIndex), weights_.string());
    std::set<std::string> files;
    for (const auto& [tensor, file] : index) files.insert(file);
    std::map<std::string, std::string> found;
    for (const std::string& file : files) {
      TensorFile shard = read(folder_ / file);
      for (const StoredTensor& tensor : shard.tensors) found.emplace(tensor.name, file);
      add(std::move(shard));
    }
    for (const auto& [tensor, file] : index) {
      const auto at = found.find(tensor);
      if (at == found.end() || at->second != file) fail("{:?} is not in {}", tensor, file);
    }
  }

  void add(TensorFile file) {
    for (StoredTensor& tensor : file.tensors) {
      const std::string name = official_name(tensor.name);
      if (!stored_.emplace(name, std::move(tensor)).second)
        fail("there are two tensors {:?}", name);
    }
  }

  std::string official_name(const std::string& name) const {
    const bool is_embedding = name == "backbone.embeddings.weight";
    return config().layout == Layout::fla && is_embedding ? std::string(kEmbedding) : name;
  }

  // Every parameter is in the files; what else is there is ignored with a warning.
  void check_complete(const std::vector<TensorSpec>& table) {
    std::set<std::string> names;
    std::vector<std::string> missing, extra;
    for (const TensorSpec& spec : table) {
      names.insert(spec.name);
      if (stored_.count(spec.name) == 0) missing.push_back(spec.name);
    }
    if (config().tied) names.insert(std::string(kHead));
    for (const auto& [name, tensor] : stored_) {
      if (names.count(name) == 0) extra.push_back(fmt::format("{:?}", name));
    }
    if (!missing.empty()) {
      fail("lacks {} that {} asks for: {}{}. Do the two belong together?", count_of(missing.size()),
           kConfigFile, list_of(missing),
           extra.empty() ? "" : fmt::format("; it has: {}", list_of(extra)));
    }
    if (!extra.empty()) {
      warn("ignored {} that the model does not have: {}", count_of(extra.size()), list_of(extra));
    }
  }

  // Moves the parameter to the result.
  void take(const TensorSpec& spec) {
    StoredTensor& tensor = stored_.at(spec.name);
    const bool is_vocab = spec.name == kEmbedding || spec.name == kHead;
    if (is_vocab && tensor.view.rank == 2 && tensor.view.dim(0) == config().vocab &&
        config().vocab < config().vocab_padded) {
      tensor = padded(tensor, config().vocab_padded);
    }
    const View want = make_view(nullptr, DType::f32, spec.dims);
    if (tensor.view.shape() != want.shape()) {
      fail("{} has the shape {}, but {} makes it {}", spec.name, tensor.view.shape(), kConfigFile,
           want.shape());
    }
    switch (tensor.view.dtype) {
      case DType::f32:
      case DType::bf16:
      case DType::f16:
        break;
      case DType::f64:  // which no op computes with
        tensor = to_f32(tensor);
        break;
      default:
        fail("{} is of type {}, which weights cannot be", spec.name, name_of(tensor.view.dtype));
    }
    checkpoint_.tensors.add(spec.name, tensor.view, tensor.owner);
  }

  void check_tied_head() {
    const auto head = stored_.find(std::string(kHead));
    if (!config().tied || head == stored_.end()) return;
    if (!same_values(head->second.view, stored_.at(std::string(kEmbedding)).view)) {
      warn("{} differs from the embedding and is ignored, because tie_embeddings is true", kHead);
    }
  }

  void warn_of_non_finite() {
    ThreadPool threads;
    std::vector<std::string> found;
    for (const std::string& name : checkpoint_.tensors.names()) {
      const View& view = checkpoint_.tensors.at(name);
      const int64_t count = count_non_finite(view, threads);
      if (count > 0) found.push_back(fmt::format("{} ({} of {})", name, count, view.size()));
    }
    if (!found.empty()) warn("values that are NaN or infinite: {}", list_of(found));
  }

  template <typename... Args>
  void warn(fmt::format_string<Args...> format, Args&&... args) {
    checkpoint_.warnings.push_back(
        fmt::format("{}: {}", weights_.string(), fmt::format(format, std::forward<Args>(args)...)));
  }

  fs::path folder_;
  fs::path weights_;  // the file, or the index of the files, that they are read from
  std::map<std::string, StoredTensor, std::less<>> stored_;  // by official name
  Checkpoint checkpoint_;
};

// The tensors of the file, in the order of the table. The reference package wants a tied head
// stored as well.
std::vector<NamedView> views_to_save(const Config& config, const NamedTensors& tensors) {
  std::vector<NamedView> views;
  for (const TensorSpec& spec : parameter_table(config)) {
    const View& view = tensors.at(spec.name);
    const View want = make_view(nullptr, DType::f32, spec.dims);
    if (view.shape() != want.shape()) {
      error("[save_checkpoint] shape of {}: got {}, want {}", spec.name, view.shape(),
            want.shape());
    }
    views.push_back({spec.name, view});
  }
  if (config.tied) views.push_back({std::string(kHead), tensors.at(kEmbedding)});
  return views;
}

}  // namespace

Checkpoint load_checkpoint(const fs::path& folder, std::string_view decay_act) {
  return Loader(folder, decay_act).load();
}

void save_checkpoint(const fs::path& folder, const Config& config, const NamedTensors& tensors) {
  const std::vector<NamedView> views = views_to_save(config, tensors);
  std::error_code failure;
  fs::create_directories(folder, failure);
  if (failure) error("cannot create {}: {}", folder.string(), failure.message());

  AtomicFile weights(folder / kSafetensorsFile);
  AtomicFile config_file(folder / kConfigFile);
  write_safetensors(weights, views, {{"format", "pt"}});
  config_file.write(to_json(config));
  weights.sync();
  config_file.sync();
  weights.commit();
  config_file.commit();
}

}  // namespace mamba3
