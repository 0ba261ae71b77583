// mamba3 logits: what a model expects after every token, for comparison with other implementations.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/read_text.h"
#include "core/error.h"
#include "formats/safetensors.h"
#include "infer/engine.h"
#include "infer/model_impl.h"

namespace mamba3::cli {

namespace {

struct Options {
  ModelOptions model;
  std::string tokens;
  std::string output;
  std::optional<int64_t> split;
};

// Token ids (B, T).
struct Batch {
  int64_t B = 0, T = 0;
  std::vector<int32_t> ids;
};

int32_t parse_id(const nlohmann::json& value, const std::string& file, int64_t b, int64_t t) {
  if (!value.is_number_integer()) {
    input_error("{}: element {} of sequence {} is {}, want a token id", file, t, b, value.dump());
  }
  const auto id = value.get<int64_t>();
  if (id < 0 || id > std::numeric_limits<int32_t>::max()) {
    input_error("{}: token id {} at position {} of sequence {} is out of range", file, value.dump(),
                t, b);
  }
  return static_cast<int32_t>(id);
}

Batch parse_batch(const std::string& file) {
  const nlohmann::json json =
      nlohmann::json::parse(read_text(file), nullptr, /*allow_exceptions=*/false);
  constexpr std::string_view kWanted = "want an array of equal-length arrays of token ids";
  if (json.is_discarded()) input_error("{} is not JSON: {}", file, kWanted);
  if (!json.is_array() || json.empty()) input_error("{}: {}", file, kWanted);
  Batch batch;
  for (const nlohmann::json& sequence : json) {
    if (!sequence.is_array() || sequence.empty()) {
      input_error("{}: sequence {} is {}, {}", file, batch.B,
                  sequence.is_array() ? "empty" : "not an array", kWanted);
    }
    const auto T = static_cast<int64_t>(sequence.size());
    if (batch.B == 0) batch.T = T;
    if (T != batch.T) {
      input_error("{}: sequence {} has {} tokens and sequence 0 has {}, {}", file, batch.B, T,
                  batch.T, kWanted);
    }
    for (int64_t t = 0; t < T; ++t)
      batch.ids.push_back(parse_id(sequence[static_cast<size_t>(t)], file, batch.B, t));
    ++batch.B;
  }
  return batch;
}

void run(const Options& options) {
  const Batch batch = parse_batch(options.tokens);
  const int64_t T = batch.T, prompt = options.split.value_or(T);
  if (prompt < 1 || prompt > T) {
    input_error("--split {}: the sequences have {} tokens, want 1 to {}", prompt, T, T);
  }
  const Model model = load_model(options.model);
  const LanguageModel& language_model = model.impl().language_model;
  Engine engine(language_model, batch.B, options.model.threads,
                state_types(language_model, options.model.state_dtype));
  const int64_t V = model.info().vocab_padded;
  const NamedTensors memory = allocate({{.name = "logits", .dims = {batch.B, T, V}}});
  const View logits = memory.at("logits"), ids = view_of(batch.ids.data(), {batch.B, T});
  engine.append(ids.slice(1, 0, prompt), logits.slice(1, 0, prompt));
  for (int64_t t = prompt; t < T; ++t)
    engine.append(ids.slice(1, t, t + 1), logits.slice(1, t, t + 1));
  const NamedView out{"logits", logits};
  write_safetensors(options.output, {&out, 1});
}

}  // namespace

void add_logits(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("logits", "Write the logits after every token of given sequences");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  add_run_options(*command, options->model);
  command->add_option("--tokens", options->tokens, "JSON: an array of equal-length arrays of ids")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("-o,--output", options->output,
                   "Safetensors file to write: `logits` (B, T, padded V), float32")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--split", options->split,
                   "Read the first K positions as one prompt and the rest token by token")
      ->type_name("K");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
