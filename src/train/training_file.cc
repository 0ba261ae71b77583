#include "train/training_file.h"

#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "formats/atomic_file.h"
#include "formats/safetensors.h"
#include "model/checkpoint.h"

namespace mamba3 {

namespace {

namespace fs = std::filesystem;

constexpr const char* kFormat = "mamba3.cpp training state 1";

fs::path training_file(const fs::path& folder) {
  return folder / "training.safetensors";
}

std::string json_of(const SavedRun& run) {
  const nlohmann::ordered_json json = {
      {"step", run.position.step},         {"tokens", run.position.tokens},
      {"solved", run.position.solved},     {"seconds", run.position.seconds},
      {"accuracy", run.position.accuracy}, {"updates", run.state.updates},
      {"fingerprint", run.fingerprint}};
  return json.dump();
}

void read_json(const std::string& text, SavedRun& run) {
  const auto json = nlohmann::json::parse(text);
  json.at("step").get_to(run.position.step);
  json.at("tokens").get_to(run.position.tokens);
  run.position.solved = json.value("solved", int64_t{0});  // absent in older files
  json.at("seconds").get_to(run.position.seconds);
  json.at("accuracy").get_to(run.position.accuracy);
  json.at("updates").get_to(run.state.updates);
  json.at("fingerprint").get_to(run.fingerprint);
  if (run.position.step < 0 || run.position.solved < 0 || run.state.updates < 0) {
    input_error("negative step");
  }
}

// The three sets of tensors, with the prefix of their names.
template <typename State, typename Visit>
void visit_sets(State& state, Visit&& visit) {
  visit("weights.", state.parameters);
  visit("m.", state.m);
  visit("v.", state.v);
}

// The file's tensors in memory of our own, to be updated in place.
NamedTensors read_set(const TensorFile& file, const std::string& prefix, const Config& config) {
  const std::vector<TensorSpec> table = parameter_table(config);
  NamedTensors tensors = allocate(table);
  for (const TensorSpec& spec : table) {
    const View& to = tensors.at(spec.name);
    const View& from = file.at(prefix + spec.name);
    if (from.dtype != DType::f32 || from.shape() != to.shape()) {
      input_error("{}{} is {} {}, want f32 {}", prefix, spec.name, name_of(from.dtype),
                  from.shape(), to.shape());
    }
    std::memcpy(to.data, from.data, static_cast<size_t>(to.bytes()));
  }
  return tensors;
}

std::string metadata_of(const TensorFile& file, const char* key) {
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end()) input_error("it has no {}", key);
  return found->second;
}

void check_format(const TensorFile& file) {
  const std::string format = metadata_of(file, "format");
  if (format != kFormat) input_error("its format is '{}', want '{}'", format, kFormat);
}

SavedRun read_run(const TensorFile& file) {
  check_format(file);
  SavedRun run;
  run.settings = parse_settings(metadata_of(file, "settings"));
  run.config = parse_config(metadata_of(file, "config"), "config");
  read_json(metadata_of(file, "position"), run);
  visit_sets(run.state, [&](const char* prefix, NamedTensors& tensors) {
    tensors = read_set(file, prefix, run.config);
  });
  return run;
}

// What `read` makes of the folder's file, which says what a damaged one was to be used for.
template <typename Read>
auto read_training_file(const fs::path& folder, const char* purpose, Read&& read) {
  const fs::path path = training_file(folder);
  const TensorFile file = read_safetensors(path);
  try {
    return read(file);
  } catch (const InputError& problem) {
    input_error("cannot {} {}: {}", purpose, path.string(), problem.what());
  } catch (const nlohmann::json::exception& problem) {
    input_error("cannot {} {}: {}", purpose, path.string(), problem.what());
  }
}

}  // namespace

bool has_run(const fs::path& folder) {
  return fs::exists(training_file(folder));
}

void save_run(const fs::path& folder, const SavedRun& run) {
  std::vector<NamedView> tensors;
  visit_sets(run.state, [&](const char* prefix, const NamedTensors& set) {
    for (const std::string& name : set.names()) tensors.push_back({prefix + name, set.at(name)});
  });
  AtomicFile file(training_file(folder));
  write_safetensors(file, tensors,
                    {{"format", kFormat},
                     {"settings", to_json(run.settings)},
                     {"config", to_json(run.config)},
                     {"position", json_of(run)}});
  file.sync();
  save_checkpoint(folder, run.config, run.state.parameters);
  file.commit();
}

SavedRun load_run(const fs::path& folder) {
  if (!has_run(folder)) {
    input_error("{} has no training.safetensors: there is no run to resume", folder.string());
  }
  return read_training_file(folder, "resume from", read_run);
}

std::optional<TrainSettings> read_run_settings(const fs::path& folder) {
  if (!has_run(folder)) return std::nullopt;
  return read_training_file(folder, "read the settings in", [](const TensorFile& file) {
    check_format(file);
    return parse_settings(metadata_of(file, "settings"));
  });
}

}  // namespace mamba3
