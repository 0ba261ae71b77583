#include "train/corpus.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "core/error.h"

namespace mamba3 {

namespace {

namespace fs = std::filesystem;

std::string read_text(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in.good() && !in.eof()) input_error("cannot read {}", file.string());
  return text;
}

bool is_hidden(const fs::path& path) {
  return path.filename().string().starts_with(".");
}

std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> files;
  for (auto entry = fs::recursive_directory_iterator(folder);
       entry != fs::recursive_directory_iterator(); ++entry) {
    if (is_hidden(entry->path())) {
      if (entry->is_directory()) entry.disable_recursion_pending();
    } else if (entry->is_regular_file()) {
      files.push_back(entry->path());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

struct Document {
  fs::path file;
  std::string text;
};

// Reads files once each, in order, and says what was left out.
class Reader {
 public:
  explicit Reader(std::vector<std::string>& warnings) : warnings_(warnings) {}

  void read(const fs::path& path) {
    std::error_code failure;
    const fs::file_status status = fs::status(path, failure);
    if (fs::is_directory(status)) {
      try {
        for (const fs::path& file : files_below(path)) read_found(file);
      } catch (const fs::filesystem_error& problem) {
        input_error("cannot search the folder {}: {}", path.string(), problem.code().message());
      }
    } else if (fs::exists(status)) {
      if (seen_.insert(fs::canonical(path)).second) documents_.push_back({path, read_text(path)});
    } else {
      input_error("no such file or folder: {}", path.string());
    }
  }

  std::vector<Document> take() { return std::move(documents_); }

 private:
  void read_found(const fs::path& file) {
    if (!seen_.insert(fs::canonical(file)).second) return;
    std::string text = read_text(file);
    if (text.find('\0') != std::string::npos) {
      warnings_.push_back(fmt::format("left out {}: not a text", file.string()));
    } else {
      documents_.push_back({file, std::move(text)});
    }
  }

  std::vector<std::string>& warnings_;
  std::set<fs::path> seen_;
  std::vector<Document> documents_;
};

// Where the held-out end of a text begins: not within a UTF-8 character.
size_t split_point(std::string_view text, double held_out) {
  auto at = static_cast<size_t>(static_cast<double>(text.size()) * (1 - held_out));
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) ++at;
  return at;
}

void append(std::vector<int32_t>& stream, const Tokenizer& tokenizer, const fs::path& file,
            std::string_view text) {
  if (text.empty()) return;
  try {
    const std::vector<int32_t> ids = tokenizer.encode(text);
    stream.insert(stream.end(), ids.begin(), ids.end());
  } catch (const InputError& problem) {
    input_error("{}: {}", file.string(), problem.what());
  }
  if (!tokenizer.eos().empty()) stream.push_back(tokenizer.eos().front());
}

}  // namespace

uint64_t Corpus::fingerprint() const {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a over tokens instead of bytes
  const auto mix = [&](uint64_t value) { hash = (hash ^ value) * 0x100000001b3; };
  for (const auto* stream : {&train, &held_out}) {
    for (const int32_t token : *stream) mix(static_cast<uint32_t>(token));
    mix(stream->size() + (uint64_t{1} << 32));
  }
  return hash;
}

Corpus read_corpus(const CorpusOptions& options, const Tokenizer& tokenizer) {
  Corpus corpus;
  Reader reader(corpus.warnings);
  for (const fs::path& path : options.text) reader.read(path);
  const bool separate = !options.validation.empty();
  for (const Document& document : reader.take()) {
    const std::string_view text = document.text;
    const size_t split = separate ? text.size() : split_point(text, options.held_out);
    append(corpus.train, tokenizer, document.file, text.substr(0, split));
    append(corpus.held_out, tokenizer, document.file, text.substr(split));
    corpus.bytes += std::ssize(text);
    ++corpus.documents;
  }
  if (separate) {
    Reader validation(corpus.warnings);
    validation.read(options.validation);
    for (const Document& document : validation.take()) {
      append(corpus.held_out, tokenizer, document.file, document.text);
      corpus.bytes += std::ssize(document.text);
    }
  }
  if (corpus.train.empty()) {
    const fs::path first = options.text.empty() ? fs::path() : options.text.front();
    input_error("there is no text to train on: {} {}", first.string(),
                fs::is_directory(first) ? "has no text files" : "is empty");
  }
  return corpus;
}

}  // namespace mamba3
