#include "cli/load_tokenizer.h"

#include <CLI/CLI.hpp>
#include <filesystem>
#include <string_view>

#include "core/error.h"
#include "formats/mapped_file.h"
#include "model/config.h"

namespace mamba3::cli {

namespace {

Tokenizer tokenizer_of_model(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder)) {
    input_error("-m {}: there is no such folder", folder.string());
  }
  if (const auto found = Tokenizer::find_in(folder)) return *found;
  const auto file = folder / "config.json";
  const MappedFile config(file);
  const std::string_view json(reinterpret_cast<const char*>(config.bytes().data()),
                              config.bytes().size());
  const Tokenizer bytes = Tokenizer::bytes();
  const int64_t vocab = parse_config(json, file.string()).vocab;
  if (vocab > bytes.vocab_size()) {
    input_error(
        "{} has no tokenizer.json, and its vocabulary of {} ids is not that of raw bytes; put the "
        "tokenizer.json that the model was trained with into the folder, or name it with "
        "--tokenizer (the published Mamba-3 models use Llama-3.1's, which is distributed with "
        "that model)",
        folder.string(), vocab);
  }
  return bytes;
}

}  // namespace

void add_tokenizer_options(CLI::App& command, TokenizerOptions& options) {
  command.add_option("-m,--model", options.folder, "Model folder, whose tokenizer it is")
      ->type_name("DIR");
  command
      .add_option("--tokenizer", options.file,
                  "A tokenizer.json, or bytes, instead of the model's tokenizer")
      ->type_name("FILE");
}

Tokenizer load_tokenizer(const TokenizerOptions& options) {
  if (options.file == "bytes") return Tokenizer::bytes();
  if (!options.file.empty()) return Tokenizer::from_file(options.file);
  if (options.folder.empty()) {
    input_error("no tokenizer: give -m DIR, --tokenizer FILE or --tokenizer bytes");
  }
  return tokenizer_of_model(options.folder);
}

}  // namespace mamba3::cli
