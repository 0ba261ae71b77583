// mamba3 perplexity: how well a model predicts a text.

#include "infer/perplexity.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/progress.h"
#include "cli/read_text.h"
#include "core/error.h"
#include "infer/model_impl.h"

namespace mamba3::cli {

namespace {

struct Options {
  ModelOptions model;
  std::string file;
  PerplexityOptions perplexity;
  bool json = false;
};

// Bytes of text that the scored tokens stand for: the first token is nobody's prediction, and
// special tokens such as BOS have none.
int64_t scored_bytes(const Tokenizer& tokenizer, std::span<const int32_t> tokens) {
  return std::ssize(tokenizer.decode(tokens.subspan(1), /*skip_special=*/true));
}

void print(const Options& options, const Perplexity& result, int64_t bytes) {
  if (options.json) {
    const nlohmann::ordered_json json = {{"bits_per_byte", result.bits_per_byte(bytes)},
                                         {"nats_per_token", result.nats_per_token()},
                                         {"perplexity", result.perplexity()},
                                         {"tokens", result.tokens},
                                         {"bytes", bytes},
                                         {"context", options.perplexity.context},
                                         {"carry_state", options.perplexity.carry_state}};
    fmt::print("{}\n", json.dump());
    return;
  }
  fmt::print("bits per byte   {:.4f}\n", result.bits_per_byte(bytes));
  fmt::print("nats per token  {:.4f}\n", result.nats_per_token());
  fmt::print("perplexity      {:.4f}\n", result.perplexity());
  fmt::print("scored          {} tokens, {} bytes\n", result.tokens, bytes);
}

void run(const Options& options) {
  const std::string text = read_text(options.file);
  if (text.empty()) input_error("{} is empty: there is nothing to score", options.file);
  const Model model = load_model(options.model);
  const Tokenizer& tokenizer = model.tokenizer();
  const std::vector<int32_t> tokens = tokenizer.encode(text, /*add_special=*/true);
  const LanguageModel& language_model = model.impl().language_model;
  Engine engine(language_model, 1, options.model.threads,
                state_types(language_model, options.model.state_dtype));
  Progress progress("perplexity", "tokens", std::ssize(tokens) - 1);
  const Perplexity result = perplexity(engine, tokens, options.perplexity,
                                       [&](int64_t scored) { progress.update(scored); });
  progress.finish();
  print(options, result, scored_bytes(tokenizer, tokens));
}

}  // namespace

void add_perplexity(CLI::App& app) {
  CLI::App* command = app.add_subcommand("perplexity", "Measure how well a model predicts a text");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  add_tokenizer_option(*command, options->model);
  add_run_options(*command, options->model);
  command->add_option("-f,--file", options->file, "Text to score; -: stdin")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--context", options->perplexity.context,
                   "Tokens of a window. Every token but the first of the text is scored once")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->type_name("N")
      ->capture_default_str();
  command->add_flag("--carry-state", options->perplexity.carry_state,
                    "Let a window continue the state of the one before, instead of starting anew");
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
