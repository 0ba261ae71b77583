// mamba3 detokenize: ids to text.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/load_tokenizer.h"
#include "core/error.h"
#include "tokenizer/utf8.h"

namespace mamba3::cli {

namespace {

struct Options {
  TokenizerOptions tokenizer;
  bool skip_special = false;
  bool valid_utf8 = false;
};

std::vector<int32_t> read_ids(std::istream& in) {
  nlohmann::json json;
  try {
    json = nlohmann::json::parse(in);
  } catch (const nlohmann::json::exception& problem) {
    input_error("stdin is not a JSON array of ids, such as [1, 2, 3]: {}", problem.what());
  }
  if (!json.is_array()) input_error("want a JSON array of ids on stdin, got {}", json.type_name());
  std::vector<int32_t> ids;
  for (const auto& item : json) {
    const bool fits = item.is_number_unsigned() && item.get<uint64_t>() <= INT32_MAX;
    if (!fits) input_error("item {} on stdin is {}, not an id", ids.size(), item.dump());
    ids.push_back(item.get<int32_t>());
  }
  return ids;
}

void run(const Options& options) {
  const Tokenizer tokenizer = load_tokenizer(options.tokenizer);
  std::string text = tokenizer.decode(read_ids(std::cin), options.skip_special);
  if (options.valid_utf8) text = to_valid_utf8(text);
  std::fwrite(text.data(), 1, text.size(), stdout);
}

}  // namespace

void add_detokenize(CLI::App& app) {
  auto* command = app.add_subcommand("detokenize", "A JSON array of token ids from stdin to text");
  auto options = std::make_shared<Options>();
  add_tokenizer_options(*command, options->tokenizer);
  command->add_flag("--skip-special", options->skip_special, "Leave special tokens out");
  command->add_flag("--valid-utf8", options->valid_utf8,
                    "Write U+FFFD for bytes that are not UTF-8, instead of the bytes");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
