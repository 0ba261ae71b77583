#pragma once

#include <string>

#include "mamba3/tokenizer.h"

namespace CLI {
class App;
}

namespace mamba3::cli {

// Where a command's tokenizer comes from.
struct TokenizerOptions {
  std::string folder;  // -m: the model's
  std::string file;    // --tokenizer: a tokenizer.json or "bytes"; comes before the model's
};

void add_tokenizer_options(CLI::App& command, TokenizerOptions& options);

// The tokenizer that the options name, of which one must be given. A model without a tokenizer.json
// has raw bytes if its vocabulary is no larger; else throws InputError that says where to get the
// file.
Tokenizer load_tokenizer(const TokenizerOptions& options);

}  // namespace mamba3::cli
