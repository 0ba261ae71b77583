#include "support/golden.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "model/checkpoint.h"
#include "support/files.h"

namespace mamba3::testing {

std::vector<std::filesystem::path> golden_folders() {
  std::vector<std::filesystem::path> folders;
  std::set<std::string> names;
  for (const char* root : {MAMBA3_TEST_DATA "/goldens", MAMBA3_SHARED "/goldens"}) {
    if (!std::filesystem::is_directory(root)) continue;
    for (const auto& entry : std::filesystem::directory_iterator(root)) {
      const bool golden = std::filesystem::exists(entry.path() / "expected.safetensors");
      if (golden && names.insert(entry.path().filename()).second) folders.push_back(entry.path());
    }
  }
  std::sort(folders.begin(), folders.end());
  return folders;
}

std::string golden_name(const std::filesystem::path& folder) {
  std::string name = folder.filename();
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c); }, '_');
  return name;
}

Golden::Golden(const std::filesystem::path& folder) {
  const Checkpoint checkpoint = load_checkpoint(folder);
  model = make_language_model(checkpoint.config, checkpoint.tensors);
  expected = read_safetensors(folder / "expected.safetensors");
  ids = expected.at("input_ids");
  const auto json = nlohmann::json::parse(read_file(folder / "expected.json"));
  loss = json.at("loss");
  greedy_prompt = json.at("greedy_prompt").get<std::vector<int32_t>>();
  greedy_tokens = json.at("greedy_tokens").get<std::vector<int32_t>>();
  greedy_margin = json.at("greedy_smallest_margin");
  greedy_vocab = folder.filename() == "fla-siso" ? 253 : model.config.vocab;
  dialect = json.at("dialect");
}

}  // namespace mamba3::testing
