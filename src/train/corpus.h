#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "mamba3/tokenizer.h"

namespace mamba3 {

struct CorpusOptions {
  std::vector<std::filesystem::path> text;  // files, and folders that are searched for files
  std::filesystem::path validation = {};    // a file or folder; empty: hold out a part of each file
  double held_out = 0.05;                   // that part, at the file's end
};

// Text as two streams of tokens. Each file is a document; where the tokenizer has a token that ends
// a text, one stands after each document.
struct Corpus {
  std::vector<int32_t> train, held_out;
  int64_t documents = 0;
  int64_t bytes = 0;                  // of all files
  std::vector<std::string> warnings;  // files that were left out: for the caller to show

  uint64_t fingerprint() const;  // of both streams
};

// The files of a folder are all regular files below it in the order of their names, except hidden
// ones, further names of a file that is there already, and those that hold a zero byte, which is
// not text. A file named outright is taken as it is. Throws InputError when a path does not exist,
// cannot be read, or nothing is left to train on.
Corpus read_corpus(const CorpusOptions& options, const Tokenizer& tokenizer);

}  // namespace mamba3
