// Any bytes as config.json: an InputError or a model that survives being written and read again.

#include <cstdlib>
#include <string_view>

#include "core/error.h"
#include "model/config.h"
#include "model/tensors.h"

using namespace mamba3;

namespace {

bool same_layers(const Config& a, const Config& b) {
  if (a.n_layer != b.n_layer) return false;
  for (int64_t layer = 0; layer < a.n_layer; ++layer) {
    if (a.kind(layer) != b.kind(layer)) return false;
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const Config config = parse_config(text, "input");
    const Config again = parse_config(to_json(config), "written");
    const bool same = config.D == again.D && config.d_mlp == again.d_mlp &&
                      config.vocab_padded == again.vocab_padded &&
                      config.mixer.d_proj() == again.mixer.d_proj() &&
                      config.mixer.decay_act == again.mixer.decay_act && same_layers(config, again);
    if (!same) std::abort();
    // Larger tables only cost time.
    if (config.n_layer < 100 && parameter_count(config) <= 0) std::abort();
  } catch (const InputError&) {
  }
  return 0;
}
