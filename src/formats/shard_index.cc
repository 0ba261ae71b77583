#include "formats/shard_index.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace mamba3 {

namespace {

using Json = nlohmann::json;

// {"metadata": {...}, "weight_map": {...}}
Json parse(std::string_view json, std::string_view source) {
  constexpr int kMaxDepth = 4;
  const auto callback = [&](int depth, Json::parse_event_t, const Json&) {
    if (depth > kMaxDepth) input_error("{}: nested too deeply", source);
    return true;
  };
  try {
    return Json::parse(json, callback);
  } catch (const Json::exception& exception) {
    input_error("{}: not valid JSON: {}", source, exception.what());
  }
}

// Names a file beside the index and not one elsewhere.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." &&
         std::filesystem::path(name).filename() == name;
}

}  // namespace

std::map<std::string, std::string> parse_shard_index(std::string_view json,
                                                     std::string_view source) {
  const Json root = parse(json, source);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object()) {
    input_error("{}: there is no object weight_map", source);
  }
  std::map<std::string, std::string> files;
  for (const auto& [tensor, file] : root["weight_map"].items()) {
    if (!file.is_string() || !is_plain_name(file.get<std::string>())) {
      input_error("{}: the file of {:?} must be a name without folders, got {}", source, tensor,
                  file.dump());
    }
    files[tensor] = file.get<std::string>();
  }
  return files;
}

}  // namespace mamba3
