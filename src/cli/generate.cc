// mamba3 generate: continue a prompt.

#include "mamba3/generate.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "cli/read_text.h"
#include "core/error.h"

namespace mamba3::cli {

namespace {

struct Options {
  ModelOptions model;
  std::optional<std::string> prompt;
  std::optional<std::vector<int32_t>> prompt_tokens;
  std::optional<std::string> prompt_file;
  std::optional<std::string> prompts_file;
  int64_t batch = 1;
  int64_t parallel = BatchOptions{}.parallel;
  GenerateOptions generate;
  std::optional<uint64_t> seed;
  bool ignore_eos = false;
  bool echo = false;
  bool print_tokens = false;
  bool json = false;
  std::string save_state;
  std::string load_state;
};

bool is_many(const Options& options) {
  return options.prompts_file || options.batch > 1;
}

void check_prompt(const Options& options) {
  const int given = (options.prompt ? 1 : 0) + (options.prompt_tokens ? 1 : 0) +
                    (options.prompt_file ? 1 : 0) + (options.prompts_file ? 1 : 0);
  if (given > 1) {
    input_error("give one of --prompt, --prompt-tokens, --file and --prompts, not {}", given);
  }
  if (given == 0 && options.load_state.empty()) {
    input_error(
        "no prompt: give -p TEXT, --prompt-tokens 1,2,3, -f FILE or --prompts FILE, or a "
        "--load-state to continue from");
  }
  if (is_many(options) && !(options.save_state.empty() && options.load_state.empty())) {
    input_error("a state is of one text: leave --batch and --prompts out");
  }
}

std::string prompt_text(const Options& options) {
  if (options.prompt_file) return read_text(*options.prompt_file);
  return options.prompt.value_or("");
}

// A prompt a line: a JSON string, or an object with one as its "prompt".
std::vector<std::string> read_prompts(const std::string& path) {
  const std::string text = read_text(path);
  std::vector<std::string> prompts;
  int64_t number = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = std::string_view(text).substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const auto& prompt = json.is_object() && json.contains("prompt") ? json["prompt"] : json;
    if (!prompt.is_string()) {
      input_error("{}: line {} is neither a JSON string nor an object with a \"prompt\"", path,
                  number);
    }
    prompts.push_back(prompt.get<std::string>());
  }
  if (prompts.empty()) input_error("{} has no prompts", path);
  return prompts;
}

void show(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

double rate(int64_t tokens, double seconds) {
  return seconds > 0 ? static_cast<double>(tokens) / seconds : 0;
}

nlohmann::ordered_json to_json(const Generation& g, uint64_t seed) {
  const int64_t drawn = std::ssize(g.tokens);
  return {{"text", g.text},
          {"tokens", g.tokens},
          {"finish_reason", name_of(g.finish_reason)},
          {"prompt_tokens", g.prompt_tokens},
          {"prompt_tokens_per_second", rate(g.prompt_tokens, g.prompt_seconds)},
          {"tokens_per_second", rate(drawn, g.seconds)},
          {"seed", seed}};
}

template <typename Prompt>
std::vector<Prompt> repeated(const std::vector<Prompt>& prompts, int64_t times) {
  std::vector<Prompt> out;
  for (const Prompt& prompt : prompts) out.insert(out.end(), static_cast<size_t>(times), prompt);
  return out;
}

// Prints generations in the order of their prompts, as soon as it can.
class ManyPrinter {
 public:
  ManyPrinter(const Options& options, const std::vector<std::string>& texts)
      : options_(options), texts_(texts) {}

  void add(int64_t index, const Generation& generation) {
    waiting_.emplace(index, generation);
    for (; !waiting_.empty() && waiting_.begin()->first == next_; ++next_) {
      print(waiting_.begin()->second);
      waiting_.erase(waiting_.begin());
    }
    std::fflush(stdout);
  }

 private:
  void print(const Generation& g) const {
    if (options_.json) {
      nlohmann::ordered_json json = {{"index", next_}, {"prompt", next_ / options_.batch}};
      json.update(to_json(g, options_.generate.sampling.seed));
      return fmt::print("{}\n", json.dump());
    }
    if (options_.print_tokens) return fmt::print("{}\n", nlohmann::json(g.tokens).dump());
    fmt::print("--- {} ---\n", next_);
    if (options_.echo) show(texts_.at(static_cast<size_t>(next_)));
    show(g.text + "\n");
  }

  const Options& options_;
  const std::vector<std::string>& texts_;
  std::map<int64_t, Generation> waiting_;
  int64_t next_ = 0;
};

void run_many(const Options& options) {
  std::vector<std::string> texts;
  if (options.prompts_file) texts = read_prompts(*options.prompts_file);
  if (options.prompt || options.prompt_file) texts = {prompt_text(options)};
  texts = repeated(texts, options.batch);
  const Model model = load_model(options.model);
  if (!options.json && !options.print_tokens) model.tokenizer();  // text must be possible
  const BatchOptions batch{
      .generate = options.generate,
      .session = {.threads = options.model.threads, .state_dtype = options.model.state_dtype},
      .parallel = options.parallel};
  ManyPrinter printer(options, texts);
  const OnGeneration print = [&](int64_t index, const Generation& g) { printer.add(index, g); };
  const auto begin = std::chrono::steady_clock::now();
  std::vector<Generation> all;
  if (options.prompt_tokens) {
    const std::vector<std::vector<int32_t>> one = {*options.prompt_tokens};
    all = generate_batch(model, repeated(one, options.batch), batch, print);
  } else {
    all = generate_batch(model, texts, batch, print);
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  int64_t drawn = 0;
  for (const Generation& g : all) drawn += std::ssize(g.tokens);
  fmt::print(stderr, "{} texts: {} tokens, {:.1f} tokens/s, prompts included; seed {}\n",
             all.size(), drawn, rate(drawn, seconds), options.generate.sampling.seed);
}

void run(Options options) {
  check_prompt(options);
  options.generate.sampling.seed = options.seed ? *options.seed : std::random_device{}();
  options.generate.stop_at_eos = !options.ignore_eos;
  if (is_many(options)) return run_many(options);
  const std::string text = prompt_text(options);
  const Model model = load_model(options.model);
  const bool stream = !options.json && !options.print_tokens;
  if (stream) model.tokenizer();  // text must be possible
  Session session(model,
                  {.threads = options.model.threads, .state_dtype = options.model.state_dtype});
  if (!options.load_state.empty()) session.load(options.load_state);

  if (stream && options.echo) show(text);
  const OnToken on_token = [&](const GeneratedToken& token) {
    if (stream) show(token.text);
    return true;
  };
  const Generation g = options.prompt_tokens
                           ? generate(session, std::span<const int32_t>(*options.prompt_tokens),
                                      options.generate, on_token)
                           : generate(session, text, options.generate, on_token);
  if (stream) show("\n");
  if (options.print_tokens && !options.json) fmt::print("{}\n", nlohmann::json(g.tokens).dump());
  if (options.json) fmt::print("{}\n", to_json(g, options.generate.sampling.seed).dump());
  if (!options.save_state.empty()) session.save(options.save_state);

  const int64_t drawn = std::ssize(g.tokens);
  fmt::print(stderr, "prompt: {} tokens, {:.1f} tokens/s; generation: {} tokens, {:.1f} tokens/s",
             g.prompt_tokens, rate(g.prompt_tokens, g.prompt_seconds), drawn,
             rate(drawn, g.seconds));
  if (options.generate.sampling.temperature > 0)
    fmt::print(stderr, "; seed {}", options.generate.sampling.seed);
  fmt::print(stderr, "\n");
}

void add_prompt(CLI::App& command, Options& options) {
  command.add_option("-p,--prompt", options.prompt, "Text to continue")
      ->type_name("TEXT")
      ->group("Prompt");
  command.add_option("--prompt-tokens", options.prompt_tokens, "Token ids to continue: 1,2,3")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->type_name("IDS")
      ->group("Prompt");
  command.add_option("-f,--file", options.prompt_file, "File with the text to continue; -: stdin")
      ->type_name("FILE")
      ->group("Prompt");
  command
      .add_option("--prompts", options.prompts_file,
                  "File with many prompts, a line each: a JSON string, or an object with a "
                  "\"prompt\"; -: stdin")
      ->type_name("FILE")
      ->group("Prompt");
  command
      .add_option("--batch", options.batch,
                  "Texts to write on from every prompt, with draws of their own")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N")
      ->capture_default_str()
      ->group("Prompt");
  command
      .add_option("--parallel", options.parallel,
                  "Texts of --batch or --prompts that are written at once")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("N")
      ->capture_default_str()
      ->group("Prompt");
  command.add_option("--load-state", options.load_state, "Continue from a saved state")
      ->type_name("FILE")
      ->group("Prompt");
}

void add_sampling(CLI::App& command, Options& options) {
  Sampling& s = options.generate.sampling;
  const auto add = [&](const char* flag, auto& value, const char* description) {
    command.add_option(flag, value, description)->capture_default_str()->group("Sampling");
  };
  add("--temp", s.temperature, "Temperature; 0: always the most likely token");
  add("--top-k", s.top_k, "Draw from the K most likely tokens; 0: off");
  add("--top-p", s.top_p, "Draw from the most likely tokens that sum to this probability; 1: off");
  add("--min-p", s.min_p, "Drop tokens below this fraction of the largest probability; 0: off");
  add("--repeat-penalty", s.repeat_penalty, "Above 1: make recent tokens less likely");
  add("--repeat-window", s.repeat_window, "Tokens that count as recent");
  command.add_option("--seed", options.seed, "Of the draws; a random one is taken and shown")
      ->type_name("N")
      ->group("Sampling");
}

void add_output(CLI::App& command, Options& options) {
  command.add_option("-n,--tokens", options.generate.max_tokens, "Tokens to generate at most")
      ->capture_default_str()
      ->group("Output");
  command.add_option("--stop", options.generate.stop, "Text that ends the generation; may repeat")
      ->allow_extra_args(false)
      ->type_name("TEXT")
      ->group("Output");
  command.add_flag("--ignore-eos", options.ignore_eos, "Go on after the end-of-text token")
      ->group("Output");
  command.add_flag("--echo", options.echo, "Print the prompt in front")->group("Output");
  command.add_flag("--print-tokens", options.print_tokens, "Print ids as a JSON array, not text")
      ->group("Output");
  command.add_flag("--json", options.json, "Print a JSON object a text at its end, not the text")
      ->group("Output");
  command.add_option("--save-state", options.save_state, "Write the state after the last token")
      ->type_name("FILE")
      ->group("Output");
}

}  // namespace

void add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  add_tokenizer_option(*command, options->model);
  add_run_options(*command, options->model);
  add_prompt(*command, *options);
  add_sampling(*command, *options);
  add_output(*command, *options);
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
