#include "tokenizer/tokenizer_file.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "core/error.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/unicode.h"

namespace mamba3 {

namespace {

using Json = nlohmann::json;

// ---- reading, with complaints that name the place
// ------------------------------------------------

class Node {
 public:
  Node(const Json& json, std::string_view source, std::string place)
      : json_(&json), source_(source), place_(std::move(place)) {}

  [[noreturn]] void fail(const std::string& complaint) const {
    input_error("{}: {}{}{}", source_, place_, place_.empty() ? "" : ": ", complaint);
  }

  const Json& object() const { return expect(json_->is_object(), "an object"); }
  const Json& array() const { return expect(json_->is_array(), "an array"); }
  const std::string& string() const {
    return expect(json_->is_string(), "a string").get_ref<const std::string&>();
  }
  bool boolean() const { return expect(json_->is_boolean(), "true or false").get<bool>(); }
  bool is_string() const { return json_->is_string(); }
  // An id in [0, limit).
  int32_t id(int64_t limit) const {
    expect(json_->is_number_integer(), "an integer");
    const auto value = to_id(*json_, limit);
    if (!value) fail(fmt::format("got {}, want an id from 0 to {}", json_->dump(), limit - 1));
    return *value;
  }
  static std::optional<int32_t> to_id(const Json& json, int64_t limit) {
    const bool fits =
        json.is_number_unsigned() && json.get<uint64_t>() < static_cast<uint64_t>(limit);
    return fits ? std::optional(json.get<int32_t>()) : std::nullopt;
  }

  // The member `key`, which must be there.
  Node at(const std::string& key) const {
    const auto found = object().find(key);
    if (found == json_->end()) fail(fmt::format("\"{}\" is missing", key));
    return member(*found, key);
  }
  // The member `key` unless it is absent or null.
  std::optional<Node> find(const std::string& key) const {
    const auto found = object().find(key);
    if (found == json_->end() || found->is_null()) return std::nullopt;
    return member(*found, key);
  }
  bool flag(const std::string& key, bool otherwise) const {
    const auto found = find(key);
    return found ? found->boolean() : otherwise;
  }
  std::vector<Node> items() const {
    std::vector<Node> nodes;
    for (const Json& item : array()) nodes.push_back(element(item, nodes.size()));
    return nodes;
  }
  Node member(const Json& value, const std::string& key) const {
    return Node(value, source_, place_.empty() ? key : place_ + "." + key);
  }
  Node element(const Json& value, size_t index) const {
    return Node(value, source_, fmt::format("{}[{}]", place_, index));
  }

 private:
  const Json& expect(bool holds, const char* what) const {
    if (!holds) fail(fmt::format("want {}, got {}", what, json_->type_name()));
    return *json_;
  }

  const Json* json_;
  std::string_view source_;
  std::string place_;
};

Json parse(std::string_view text, std::string_view source,
           const Json::parser_callback_t& callback = nullptr) {
  try {
    return Json::parse(text, callback);
  } catch (const Json::exception& problem) {
    // Without the library's "[json.exception.parse_error.101] " and what it quotes at length.
    const std::string message = problem.what();
    const size_t begin = message.find("] ");
    input_error("{}: not valid JSON: {}", source,
                message.substr(begin == message.npos ? 0 : begin + 2, 200));
  }
}

// A tokenizer.json whose two long lists are taken out of the document while it is parsed: as values
// of the document they would take several times as long.
struct Document {
  Json rest;
  std::vector<std::pair<std::string, Json>> vocab;  // in place of model.vocab's members
  std::vector<Json> merges;                         // in place of model.merges' items
};

Document parse_document(std::string_view text, std::string_view source) {
  using Event = Json::parse_event_t;
  Document document;
  std::array<std::string, 2> path;  // the keys that lead to the value at depth 2
  const auto callback = [&](int depth, Event event, Json& value) {
    const bool in_model = path[0] == "model";
    if (event == Event::key && depth == 1) path = {value.get<std::string>(), ""};
    if (event == Event::key && depth == 2) path[1] = value.get<std::string>();
    if (depth != 3 || !in_model) return true;
    if (path[1] == "vocab" && event == Event::key) {
      document.vocab.emplace_back(std::move(value.get_ref<std::string&>()), Json());
      return false;
    }
    if (path[1] == "vocab" && event == Event::value && !document.vocab.empty()) {
      document.vocab.back().second = std::move(value);
      return false;
    }
    const bool ends = event == Event::value || event == Event::array_end;
    if (path[1] == "merges" && ends) {
      document.merges.push_back(std::move(value));
      return false;
    }
    return true;
  };
  document.rest = parse(text, source, callback);
  return document;
}

// ---- parts that come in several types
// ------------------------------------------------------------

std::string type_of(const Node& part) {
  return part.at("type").string();
}

[[noreturn]] void refuse_type(const Node& part, std::string_view supported) {
  part.fail(
      fmt::format("the type \"{}\" is not supported; supported: {}", type_of(part), supported));
}

// The parts of a Sequence, whose items are under `key`, nested ones included; of any other part
// itself.
std::vector<Node> flatten(const Node& part, const std::string& key) {
  if (type_of(part) != "Sequence") return {part};
  std::vector<Node> parts;
  for (const Node& item : part.at(key).items()) {
    if (type_of(item) == "Sequence") item.fail("a Sequence within a Sequence is not supported");
    parts.push_back(item);
  }
  return parts;
}

bool parse_normalizer(const Node& root) {
  const auto normalizer = root.find("normalizer");
  if (!normalizer) return false;
  const auto parts = flatten(*normalizer, "normalizers");
  for (const Node& part : parts) {
    if (type_of(part) != "NFC") refuse_type(part, "NFC, a Sequence of NFC, or none");
  }
  return !parts.empty();
}

SplitBehavior parse_behavior(const Node& behavior) {
  constexpr std::array<std::pair<std::string_view, SplitBehavior>, 5> kNames = {{
      {"Isolated", SplitBehavior::isolated},
      {"Removed", SplitBehavior::removed},
      {"Contiguous", SplitBehavior::contiguous},
      {"MergedWithPrevious", SplitBehavior::merged_with_previous},
      {"MergedWithNext", SplitBehavior::merged_with_next},
  }};
  for (const auto& [name, value] : kNames) {
    if (behavior.string() == name) return value;
  }
  behavior.fail(fmt::format(
      "\"{}\" is unknown; known: Isolated, Removed, Contiguous, MergedWithPrevious, MergedWithNext",
      behavior.string()));
}

Regex parse_pattern(const Node& pattern) {
  std::string expression;
  if (const auto regex = pattern.find("Regex")) {
    expression = regex->string();
  } else {
    for (const char c : pattern.at("String").string()) {
      if (std::string_view(R"(\.+*?()|[]{}^$#&-~)").find(c) != std::string_view::npos) {
        expression += '\\';
      }
      expression += c;
    }
  }
  try {
    return Regex(expression);
  } catch (const InputError& problem) {
    pattern.fail(problem.what());
  }
}

std::vector<SplitStep> parse_pre_tokenizer(const Node& root) {
  constexpr std::string_view kSupported = "Split, and ByteLevel as the last one";
  const auto pre_tokenizer = root.find("pre_tokenizer");
  const auto parts = pre_tokenizer ? flatten(*pre_tokenizer, "pretokenizers") : std::vector<Node>();
  if (parts.empty() || type_of(parts.back()) != "ByteLevel") {
    root.fail(
        "pre_tokenizer does not end with ByteLevel; only byte-level tokenizers, as GPT-2, "
        "GPT-NeoX and Llama 3 have, are supported");
  }
  std::vector<SplitStep> steps;
  for (const Node& part : parts) {
    SplitStep step;
    if (type_of(part) == "ByteLevel" && steps.size() + 1 == parts.size()) {
      step.add_prefix_space = part.at("add_prefix_space").boolean();
      if (part.flag("use_regex", true)) step.regex = gpt2_regex();
    } else if (type_of(part) == "Split") {
      step.regex = parse_pattern(part.at("pattern"));
      step.behavior = parse_behavior(part.at("behavior"));
      step.invert = part.at("invert").boolean();
    } else {
      refuse_type(part, kSupported);
    }
    steps.push_back(std::move(step));
  }
  return steps;
}

void check_decoder(const Node& root) {
  const auto decoder = root.find("decoder");
  if (!decoder) root.fail("decoder is missing; supported: ByteLevel");
  const auto parts = flatten(*decoder, "decoders");
  if (parts.size() != 1) decoder->fail("want ByteLevel alone");
  if (type_of(parts[0]) != "ByteLevel") refuse_type(parts[0], "ByteLevel");
}

// ---- model and added tokens
// ----------------------------------------------------------------------

using Ids = std::unordered_map<std::string_view, int32_t>;

// A file that uses few of its ids would make huge tables of nothing.
int64_t id_limit(size_t tokens) {
  return 4 * static_cast<int64_t>(tokens) + 1024;
}

void add_spelling(TokenizerFile& file, int32_t id, const std::string& spelling, const Node& place) {
  const auto index = static_cast<size_t>(id);
  if (index >= file.spellings.size()) file.spellings.resize(index + 1);
  auto& entry = file.spellings[index];
  if (entry) {
    place.fail(fmt::format("\"{}\" and \"{}\" have the same id {}", *entry, spelling, id));
  }
  entry = spelling;
}

// The ids by spelling. The spellings are those of the document.
Ids parse_vocab(const Node& model, const Document& document, TokenizerFile& file) {
  const Node place = model.at("vocab");
  place.object();
  if (document.vocab.empty()) place.fail("the vocabulary is empty");
  Ids ids;
  ids.reserve(document.vocab.size());
  file.spellings.reserve(document.vocab.size());
  const int64_t limit = id_limit(document.vocab.size());
  for (const auto& [spelling, value] : document.vocab) {
    // Most files have a great many good entries: only for a bad one is the place worked out.
    const auto id = Node::to_id(value, limit);
    if (!id) place.member(value, "\"" + spelling + "\"").id(limit);
    if (!ids.emplace(spelling, *id).second) {
      place.fail(fmt::format("\"{}\" is in the vocabulary twice", spelling));
    }
    add_spelling(file, *id, spelling, place);
  }
  return ids;
}

// A merge is "left right" or ["left", "right"].
std::optional<std::pair<std::string_view, std::string_view>> parse_merge(const Json& merge) {
  const auto view = [](const Json& json) -> std::string_view {
    return json.get_ref<const std::string&>();
  };
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::pair(view(merge[0]), view(merge[1]));
  }
  if (!merge.is_string()) return std::nullopt;
  const std::string_view text = view(merge);
  const size_t space = text.find(' ');
  if (space == text.npos || text.find(' ', space + 1) != text.npos) return std::nullopt;
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

std::vector<Bpe::Merge> parse_merges(const Node& model, const Document& document, const Ids& ids) {
  const Node place = model.at("merges");
  if (!place.array().empty()) place.fail("want strings or pairs of strings");
  std::vector<Bpe::Merge> merges;
  merges.reserve(document.merges.size());
  std::string joined;
  for (size_t i = 0; i < document.merges.size(); ++i) {
    const Json& merge = document.merges[i];
    const auto pair = parse_merge(merge);
    if (!pair) {
      place.element(merge, i).fail("want two tokens, \"left right\" or [\"left\", \"right\"]");
    }
    const auto id_of = [&](std::string_view spelling) {
      const auto found = ids.find(spelling);
      if (found == ids.end()) {
        place.element(merge, i).fail(fmt::format("\"{}\" is not in the vocabulary", spelling));
      }
      return found->second;
    };
    joined.assign(pair->first).append(pair->second);
    merges.push_back({.left = id_of(pair->first),
                      .right = id_of(pair->second),
                      .merged = id_of(joined),
                      .rank = static_cast<int32_t>(i)});
  }
  return merges;
}

void refuse_unless_empty(const Node& model, const std::string& key) {
  const auto value = model.find(key);
  if (value && !value->string().empty()) {
    value->fail(fmt::format("\"{}\" is not supported; want null", value->string()));
  }
}

void check_options(const Node& model) {
  if (const auto type = model.find("type"); type && type->string() != "BPE") {
    refuse_type(model, "BPE (byte-level, as GPT-2, GPT-NeoX and Llama 3 use it)");
  }
  refuse_unless_empty(model, "continuing_subword_prefix");
  refuse_unless_empty(model, "end_of_word_suffix");
  if (model.flag("byte_fallback", false)) {
    model.fail("byte_fallback is not supported; want false");
  }
  if (model.find("dropout")) model.fail("dropout is for training and not supported; want null");
}

Ids parse_model(const Node& model, const Document& document, TokenizerFile& file) {
  check_options(model);
  Ids ids = parse_vocab(model, document, file);
  Bpe::Tables& tables = file.bpe;
  tables.merges = parse_merges(model, document, ids);
  const bool ignore_merges = model.flag("ignore_merges", false);
  for (const auto& [spelling, id] : ids) {
    const auto bytes = byte_level_bytes(spelling);
    if (!bytes) continue;
    if (bytes->size() == 1) tables.byte_ids[static_cast<uint8_t>((*bytes)[0])] = id;
    if (ignore_merges) tables.whole_words.emplace(*bytes, id);
  }
  if (const auto unknown = model.find("unk_token")) {
    const auto found = ids.find(unknown->string());
    if (found == ids.end()) {
      unknown->fail(fmt::format("\"{}\" is not in the vocabulary", unknown->string()));
    }
    tables.unknown = found->second;
    tables.fuse_unknown = model.flag("fuse_unk", false);
  }
  return ids;
}

AddedToken parse_added_token(const Node& entry, int64_t limit) {
  return {.content = entry.at("content").string(),
          .id = entry.at("id").id(limit),
          .single_word = entry.at("single_word").boolean(),
          .lstrip = entry.at("lstrip").boolean(),
          .rstrip = entry.at("rstrip").boolean(),
          .normalized = entry.at("normalized").boolean(),
          .special = entry.at("special").boolean()};
}

// The reference takes the id of an added token from the vocabulary, or else counts on from the
// vocabulary's size, whatever id the file gives. A file that does not agree is refused: which of
// the two its model was trained with, nobody can tell.
void parse_added_tokens(const Node& root, const Ids& ids, TokenizerFile& file) {
  const auto list = root.find("added_tokens");
  if (!list) return;
  const auto entries = list->items();
  std::unordered_set<std::string> seen;
  auto next = static_cast<int32_t>(ids.size());
  for (const Node& entry : entries) {
    AddedToken token = parse_added_token(entry, id_limit(ids.size() + entries.size()));
    if (token.content.empty()) continue;
    const std::string spelling = token.content;
    if (file.nfc && token.normalized) token.content = nfc(spelling);
    if (!seen.insert(token.content).second) {
      entry.fail(fmt::format("\"{}\" is in the list twice", spelling));
    }
    const auto known = ids.find(spelling);
    const int32_t want = known != ids.end() ? known->second : next++;
    if (token.id != want) {
      entry.fail(fmt::format("\"{}\" has id {}, want {}: {}", spelling, token.id, want,
                             known != ids.end() ? "its id in the vocabulary"
                                                : "the first id behind the vocabulary's"));
    }
    if (known == ids.end()) add_spelling(file, token.id, spelling, entry);
    file.added_tokens.push_back(std::move(token));
  }
}

// ---- post-processor
// ------------------------------------------------------------------------------

void parse_template(const Node& part, TokenizerFile& file) {
  bool after_text = false;
  const auto pieces = part.at("single").items();
  for (const Node& piece : pieces) {
    if (const auto sequence = piece.find("Sequence")) {
      if (sequence->at("id").string() != "A" || after_text) sequence->fail("want one Sequence, A");
      after_text = true;
      continue;
    }
    const Node token = piece.at("SpecialToken").at("id");
    for (const Node& id : part.at("special_tokens").at(token.string()).at("ids").items()) {
      const int32_t value = id.id(static_cast<int64_t>(file.spellings.size()));
      if (!file.spellings[static_cast<size_t>(value)]) {
        id.fail(fmt::format("there is no token with id {}", value));
      }
      (after_text ? file.suffix : file.prefix).push_back(value);
    }
  }
  if (!after_text) part.at("single").fail("the Sequence A is missing");
}

void parse_post_processor(const Node& root, TokenizerFile& file) {
  const auto post_processor = root.find("post_processor");
  if (!post_processor) return;
  bool has_template = false;
  for (const Node& part : flatten(*post_processor, "processors")) {
    if (type_of(part) == "ByteLevel") continue;  // adjusts offsets only
    if (type_of(part) != "TemplateProcessing" || has_template) {
      refuse_type(part, "ByteLevel, one TemplateProcessing, or none");
    }
    has_template = true;
    parse_template(part, file);
  }
}

}  // namespace

TokenizerFile parse_tokenizer_json(std::string_view json, std::string_view source) {
  const Document document = parse_document(json, source);
  const Node root(document.rest, source, "");
  for (const char* key : {"truncation", "padding"}) {
    if (const auto part = root.find(key)) part->fail("is not supported; want null");
  }
  TokenizerFile file;
  file.nfc = parse_normalizer(root);
  const Ids ids = parse_model(root.at("model"), document, file);
  parse_added_tokens(root, ids, file);
  file.bpe.vocab_size = static_cast<int64_t>(file.spellings.size());
  file.pre_tokenizer = parse_pre_tokenizer(root);
  check_decoder(root);
  parse_post_processor(root, file);
  return file;
}

BoundaryTokens parse_tokenizer_config(std::string_view json, std::string_view source) {
  const Json document = parse(json, source);
  const Node root(document, source, "");
  // A token is a string, or an object with its content.
  const auto spelling = [&](const char* key) -> std::optional<std::string> {
    const auto token = root.find(key);
    if (!token) return std::nullopt;
    return token->is_string() ? token->string() : token->at("content").string();
  };
  return {.bos = spelling("bos_token"), .eos = spelling("eos_token")};
}

}  // namespace mamba3
