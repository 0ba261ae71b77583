#include "infer/state_file.h"

#include <algorithm>
#include <charconv>

#include "core/error.h"
#include "core/memory.h"
#include "formats/safetensors.h"
#include "infer/session_impl.h"
#include "model/copy_converted.h"

namespace mamba3 {

namespace {

constexpr const char* kFormat = "mamba3-state";
constexpr const char* kVersion = "1";

// What of a state tensor (rows, ...) the file holds: the first row, and of a cache the tokens.
View part_in_file(const std::string& name, const View& tensor, int64_t tokens) {
  const View row = tensor.select(0, 0);
  const bool cache = name.ends_with("cache_k") || name.ends_with("cache_v");
  return cache ? row.slice(0, 0, tokens) : row;
}

// All parts of the file that have the shape they have in a session of `tokens` tokens.
std::vector<NamedView> parts_of(Session::Impl& session, int64_t tokens) {
  std::vector<NamedView> parts;
  const NamedTensors& tensors = session.engine.states().tensors();
  for (const std::string& name : tensors.names())
    parts.push_back({name, part_in_file(name, tensors.at(name), tokens)});
  parts.push_back({"hidden", session.engine.last_hidden().select(0, 0)});
  return parts;
}

std::string metadata(const TensorFile& file, const char* key) {
  const auto found = file.metadata.find(key);
  return found == file.metadata.end() ? std::string() : found->second;
}

int64_t token_count(const TensorFile& state, const std::filesystem::path& path) {
  const std::string text = metadata(state, "tokens");
  int64_t tokens = 0;
  const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), tokens);
  if (failure != std::errc() || end != text.data() + text.size() || tokens < 1) {
    input_error("{}: the number of tokens is '{}', want a positive number", path.string(), text);
  }
  return tokens;
}

void check_origin(const TensorFile& state, const std::string& ours,
                  const std::filesystem::path& path) {
  if (metadata(state, "format") != kFormat)
    input_error("{} is not a saved state: want a file that --save-state wrote", path.string());
  if (metadata(state, "format_version") != kVersion) {
    input_error("{} has format version {}, this program reads version {}", path.string(),
                metadata(state, "format_version"), kVersion);
  }
  const std::string theirs = metadata(state, "model");
  if (theirs != ours) {
    input_error(
        "{} is the state of another model (fingerprint {}, this model has {}): load it with the "
        "model that wrote it",
        path.string(), theirs, ours);
  }
}

// The file's tensor of this name, f32 and of the wanted shape.
const View& checked(const TensorFile& state, const NamedView& want,
                    const std::filesystem::path& path) {
  const auto found = std::find_if(state.tensors.begin(), state.tensors.end(),
                                  [&](const StoredTensor& t) { return t.name == want.name; });
  if (found == state.tensors.end())
    input_error("{}: tensor {} is missing", path.string(), want.name);
  const View& got = found->view;
  if (got.dtype != DType::f32 || got.shape() != want.view.shape()) {
    input_error("{}: tensor {} is {} {}, want f32 {}", path.string(), want.name, name_of(got.dtype),
                got.shape(), want.view.shape());
  }
  return got;
}

// The shape of the tensors is known only with their number of tokens; caches of that length must be
// in the file before room is made for them.
std::vector<NamedView> wanted_parts(Session::Impl& session, int64_t tokens) {
  std::vector<NamedView> parts = parts_of(session, 0);
  for (NamedView& part : parts) {
    const bool cache = part.name.ends_with("cache_k") || part.name.ends_with("cache_v");
    if (cache) part.view.dims[0] = tokens;
  }
  return parts;
}

// A file holds f32 in host memory, so that a state moves between devices and types.
std::vector<float> floats_of(Context& ctx, const View& part) {
  std::vector<std::byte> bytes(static_cast<size_t>(part.bytes()));
  View host = part;
  host.data = bytes.data();
  host.device = Device::cpu;
  copy(ctx, part, host);
  std::vector<float> floats(static_cast<size_t>(part.size()));
  to_float(bytes.data(), part.dtype, floats.data(), part.size());
  return floats;
}

std::vector<int32_t> recent_tokens(const TensorFile& state, const std::filesystem::path& path) {
  const View& recent = state.at("recent");
  if (recent.dtype != DType::i32 || recent.rank != 1) {
    input_error("{}: tensor recent is {} {}, want i32 of rank 1", path.string(),
                name_of(recent.dtype), recent.shape());
  }
  const int32_t* tokens = recent.as<int32_t>();
  return {tokens, tokens + recent.size()};
}

}  // namespace

void save_state(const std::filesystem::path& file, Session::Impl& session) {
  const int64_t tokens = session.engine.length();
  if (tokens == 0) input_error("there is no state to save before the first token");
  std::vector<NamedView> parts = parts_of(session, tokens);
  std::vector<std::vector<float>> floats;
  for (NamedView& part : parts) {
    floats.push_back(floats_of(session.engine.context(), part.view));
    part.view.data = floats.back().data();
    part.view.dtype = DType::f32;
    part.view.device = Device::cpu;
  }
  const int64_t n = std::min<int64_t>(std::ssize(session.recent), kRecentTokens);
  parts.push_back({"recent", view_of(session.recent.data() + std::ssize(session.recent) - n, {n})});
  write_safetensors(file, parts,
                    {{"format", kFormat},
                     {"format_version", kVersion},
                     {"model", session.model.impl().fingerprint},
                     {"tokens", std::to_string(tokens)}});
}

void load_state(const std::filesystem::path& file, Session::Impl& session) {
  const TensorFile state = read_safetensors(file);
  check_origin(state, session.model.impl().fingerprint, file);
  const int64_t tokens = token_count(state, file);
  for (const NamedView& part : wanted_parts(session, tokens)) checked(state, part, file);
  std::vector<int32_t> recent = recent_tokens(state, file);

  session.engine.reserve(tokens);
  for (const NamedView& part : parts_of(session, tokens)) {
    const View& source = checked(state, part, file);
    copy_converted(session.engine.context(), source, part.view);
  }
  session.engine.set_length(tokens);
  session.recent = std::move(recent);
  session.logits_current = false;
}

}  // namespace mamba3
