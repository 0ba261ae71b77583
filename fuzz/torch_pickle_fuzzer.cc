// Any bytes as a pickle or, if they begin as a zip archive does, as a whole pytorch_model.bin: an
// InputError or tensors of which every byte can be read.

#include <cstdlib>
#include <numeric>
#include <string_view>

#include "core/error.h"
#include "formats/torch_file.h"
#include "formats/torch_pickle.h"

using namespace mamba3;

namespace {

void read_all(const TensorFile& file) {
  for (const StoredTensor& tensor : file.tensors) {
    const auto* bytes = static_cast<const uint8_t*>(tensor.view.data);
    const auto sum = std::accumulate(bytes, bytes + tensor.view.bytes(), uint64_t{0});
    if (sum > 255u * static_cast<uint64_t>(tensor.view.bytes())) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    if (text.starts_with("PK")) {
      read_all(read_torch(bytes, nullptr, "input"));
    } else {
      unpickle_state_dict(bytes, "input");
    }
  } catch (const InputError&) {
  }
  return 0;
}
