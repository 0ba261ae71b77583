#include "mamba3/tokenizer.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "core/error.h"
#include "formats/mapped_file.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/tokenizer_file.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"

namespace mamba3 {

namespace {

std::string_view text_of(const MappedFile& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// What a text goes through on its way to ids, byte-level BPE only.
class Pipeline {
 public:
  explicit Pipeline(TokenizerFile file)
      : raw_tokens_(select(file, false)),
        normalized_tokens_(select(file, true)),
        nfc_(file.nfc),
        pre_tokenizer_(std::move(file.pre_tokenizer)),
        bpe_(std::move(file.bpe)),
        prefix_(std::move(file.prefix)),
        suffix_(std::move(file.suffix)) {}

  std::vector<int32_t> encode(std::string_view text, bool add_special) const {
    std::vector<int32_t> ids;
    Bpe::Workspace workspace;
    const auto on_token = [&](int32_t id) { ids.push_back(id); };
    const auto on_word = [&](std::string_view word) { bpe_.encode(word, workspace, ids); };
    const auto on_text = [&](std::string_view stretch) { pre_tokenizer_.run(stretch, on_word); };
    if (add_special) ids = prefix_;
    raw_tokens_.split(
        text,
        [&](std::string_view stretch) {
          const std::string normalized = nfc_ ? nfc(stretch) : std::string();
          normalized_tokens_.split(nfc_ ? normalized : stretch, on_text, on_token);
        },
        on_token);
    if (add_special) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
    return ids;
  }

 private:
  // The tokens to look for before, or after, the text is normalized.
  static std::vector<AddedToken> select(const TokenizerFile& file, bool normalized) {
    std::vector<AddedToken> tokens;
    for (const AddedToken& token : file.added_tokens) {
      if (token.normalized == normalized) tokens.push_back(token);
    }
    return tokens;
  }

  AddedTokenMatcher raw_tokens_, normalized_tokens_;
  bool nfc_;
  PreTokenizer pre_tokenizer_;
  Bpe bpe_;
  std::vector<int32_t> prefix_, suffix_;
};

}  // namespace

struct Tokenizer::Impl {
  struct Token {
    bool exists = false;
    bool special = false;
    std::string spelling;
    std::string bytes;
  };
  std::vector<Token> tokens;  // by id
  std::unordered_map<std::string_view, int32_t> ids;
  std::optional<Pipeline> pipeline;  // none: raw bytes
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;

  static std::shared_ptr<Impl> of_bytes();
  static std::shared_ptr<Impl> of_file(TokenizerFile file, const BoundaryTokens& named);

  void add(size_t id, std::string spelling, std::string bytes) {
    tokens[id].exists = true;
    tokens[id].spelling = std::move(spelling);
    tokens[id].bytes = std::move(bytes);
  }
  void index_spellings();
  void find_boundaries(const std::vector<int32_t>& prefix, const BoundaryTokens& named);
  std::optional<int32_t> id_of(std::string_view spelling) const;
  const Token* find(int32_t id) const;
  const Token& at(int32_t id) const;
};

std::shared_ptr<Tokenizer::Impl> Tokenizer::Impl::of_bytes() {
  auto impl = std::make_shared<Impl>();
  impl->tokens.resize(256);
  for (size_t byte = 0; byte < 256; ++byte) {
    const std::string token(1, static_cast<char>(byte));
    impl->add(byte, byte_level_spelling(token), token);
  }
  impl->index_spellings();
  return impl;
}

std::shared_ptr<Tokenizer::Impl> Tokenizer::Impl::of_file(TokenizerFile file,
                                                          const BoundaryTokens& named) {
  auto impl = std::make_shared<Impl>();
  impl->tokens.resize(file.spellings.size());
  const auto bytes_of = [](const std::string& spelling) {
    return byte_level_bytes(spelling).value_or(spelling);
  };
  for (size_t id = 0; id < file.spellings.size(); ++id) {
    auto& spelling = file.spellings[id];
    if (!spelling) continue;
    std::string bytes = bytes_of(*spelling);
    impl->add(id, std::move(*spelling), std::move(bytes));
  }
  for (const AddedToken& added : file.added_tokens) {
    Token& token = impl->tokens[static_cast<size_t>(added.id)];
    token.special = added.special;
    token.bytes = bytes_of(added.content);
  }
  impl->index_spellings();
  impl->find_boundaries(file.prefix, named);
  impl->pipeline.emplace(std::move(file));
  return impl;
}

void Tokenizer::Impl::index_spellings() {
  ids.reserve(tokens.size());
  for (size_t id = 0; id < tokens.size(); ++id) {
    if (tokens[id].exists) ids.emplace(tokens[id].spelling, static_cast<int32_t>(id));
  }
}

// The boundaries are those that tokenizer_config.json names, and the usual names among the special
// tokens, so that a model also stops at <|end_of_text|> if its own end is, say, the end of a turn.
void Tokenizer::Impl::find_boundaries(const std::vector<int32_t>& prefix,
                                      const BoundaryTokens& named) {
  if (named.bos) bos = id_of(*named.bos);
  if (!bos && prefix.size() == 1) bos = prefix[0];
  if (named.eos) {
    if (const auto id = id_of(*named.eos)) eos.push_back(*id);
  }
  for (const char* usual : {"<|endoftext|>", "<|end_of_text|>", "</s>"}) {
    const auto id = id_of(usual);
    if (!id || !at(*id).special) continue;
    if (std::find(eos.begin(), eos.end(), *id) == eos.end()) eos.push_back(*id);
  }
}

std::optional<int32_t> Tokenizer::Impl::id_of(std::string_view spelling) const {
  const auto found = ids.find(spelling);
  return found == ids.end() ? std::nullopt : std::optional(found->second);
}

const Tokenizer::Impl::Token* Tokenizer::Impl::find(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= tokens.size()) return nullptr;
  const Token& token = tokens[static_cast<size_t>(id)];
  return token.exists ? &token : nullptr;
}

const Tokenizer::Impl::Token& Tokenizer::Impl::at(int32_t id) const {
  const Token* token = find(id);
  if (!token) input_error("there is no token with id {}; ids are 0 to {}", id, tokens.size() - 1);
  return *token;
}

Tokenizer Tokenizer::bytes() {
  return Tokenizer(Impl::of_bytes());
}

Tokenizer Tokenizer::from_json(std::string_view json, std::string_view source) {
  return Tokenizer(Impl::of_file(parse_tokenizer_json(json, source), {}));
}

Tokenizer Tokenizer::from_file(const std::filesystem::path& file) {
  TokenizerFile parsed = parse_tokenizer_json(text_of(MappedFile(file)), file.string());
  BoundaryTokens named;
  const auto config = file.parent_path() / "tokenizer_config.json";
  if (std::filesystem::is_regular_file(config)) {
    named = parse_tokenizer_config(text_of(MappedFile(config)), config.string());
  }
  return Tokenizer(Impl::of_file(std::move(parsed), named));
}

std::optional<Tokenizer> Tokenizer::find_in(const std::filesystem::path& folder) {
  const auto file = folder / "tokenizer.json";
  return std::filesystem::exists(file) ? std::optional(from_file(file)) : std::nullopt;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special) const {
  if (impl_->pipeline) return impl_->pipeline->encode(text, add_special);
  std::vector<int32_t> ids;
  ids.reserve(text.size());
  for (const char byte : text) ids.push_back(static_cast<uint8_t>(byte));
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    const Impl::Token& token = impl_->at(id);
    if (!skip_special || !token.special) bytes += token.bytes;
  }
  return bytes;
}

int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(impl_->tokens.size());
}

std::optional<int32_t> Tokenizer::bos() const {
  return impl_->bos;
}

const std::vector<int32_t>& Tokenizer::eos() const {
  return impl_->eos;
}

bool Tokenizer::is_special(int32_t id) const {
  const Impl::Token* token = impl_->find(id);
  return token && token->special;
}

std::optional<std::string> Tokenizer::token(int32_t id) const {
  const Impl::Token* token = impl_->find(id);
  return token ? std::optional(token->spelling) : std::nullopt;
}

std::optional<int32_t> Tokenizer::id(std::string_view token) const {
  return impl_->id_of(token);
}

std::string Tokenizer::description() const {
  return impl_->pipeline ? fmt::format("byte-level BPE, {} tokens", impl_->ids.size())
                         : "raw bytes, 256 tokens";
}

StreamDecoder::StreamDecoder(Tokenizer tokenizer, bool skip_special)
    : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

std::string StreamDecoder::push(int32_t id) {
  pending_ += tokenizer_.decode({&id, 1}, skip_special_);
  return take_valid_utf8(pending_);
}

std::string StreamDecoder::flush() {
  return to_valid_utf8(std::exchange(pending_, {}));
}

}  // namespace mamba3
