// Any bytes as a safetensors file: an InputError or tensors of which every byte can be read.

#include <cstdlib>
#include <numeric>

#include "core/error.h"
#include "formats/safetensors.h"

using namespace mamba3;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const TensorFile file =
        read_safetensors(std::as_bytes(std::span(data, size)), nullptr, "input");
    for (const StoredTensor& tensor : file.tensors) {
      const auto* bytes = static_cast<const uint8_t*>(tensor.view.data);
      const auto sum = std::accumulate(bytes, bytes + tensor.view.bytes(), uint64_t{0});
      if (sum > 255u * size) std::abort();
    }
  } catch (const InputError&) {
  }
  return 0;
}
