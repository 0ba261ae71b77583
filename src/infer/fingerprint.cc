#include "infer/fingerprint.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace mamba3 {

namespace {

// FNV-1a (Fowler, Noll, Vo): not against forgery, which a checkpoint's owner has no reason for.
class Hash {
 public:
  void add(std::string_view bytes) {
    for (const char c : bytes) value_ = (value_ ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    value_ = (value_ ^ bytes.size()) * 0x100000001b3;  // "ab","c" differs from "a","bc"
  }
  std::string hex() const { return fmt::format("{:016x}", value_); }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

// Pieces of a dense tensor's memory, evenly spread, the first and the last among them.
void add_samples(Hash& hash, const View& view) {
  constexpr int64_t kPieces = 16, kPieceBytes = 64;
  const char* data = static_cast<const char*>(view.data);
  const int64_t size = view.bytes(), last = std::max<int64_t>(size - kPieceBytes, 0);
  for (int64_t i = 0; i < kPieces; ++i) {
    const int64_t begin = last * i / (kPieces - 1);
    const int64_t bytes = std::min(kPieceBytes, size - begin);
    hash.add({data + begin, static_cast<size_t>(bytes)});
  }
}

}  // namespace

std::string fingerprint(const LanguageModel& model) {
  Hash hash;
  hash.add(to_json(model.config));
  for (const std::string& name : model.tensors.names()) {
    const View& view = model.tensors.at(name);
    hash.add(name);
    hash.add(name_of(view.dtype));
    hash.add(view.shape());
    add_samples(hash, view);
  }
  return hash.hex();
}

}  // namespace mamba3
