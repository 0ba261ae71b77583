// mamba3 tokenize: text to ids.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>

#include "cli/commands.h"
#include "cli/load_tokenizer.h"
#include "tokenizer/utf8.h"

namespace mamba3::cli {

namespace {

struct Options {
  TokenizerOptions tokenizer;
  bool special = false;
};

void run(const Options& options) {
  const Tokenizer tokenizer = load_tokenizer(options.tokenizer);
  const std::string text(std::istreambuf_iterator<char>(std::cin), {});
  if (const auto at = first_invalid_utf8(text)) {
    fmt::print(stderr, "note: the text is not UTF-8 (byte {}); such bytes are encoded one by one\n",
               *at);
  }
  fmt::print("[{}]\n", fmt::join(tokenizer.encode(text, options.special), ","));
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto* command = app.add_subcommand("tokenize", "Text from stdin to a JSON array of token ids");
  auto options = std::make_shared<Options>();
  add_tokenizer_options(*command, options->tokenizer);
  command->add_flag("--special", options->special,
                    "Add the special tokens that the tokenizer puts around a text, such as BOS");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
