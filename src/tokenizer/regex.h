#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace mamba3 {

// A regular expression of a tokenizer file. Those are written for Oniguruma with Ruby's syntax; the
// constructor accepts what means the same to PCRE2 and throws InputError that names the rest.
class Regex {
 public:
  explicit Regex(const std::string& pattern);

  struct Match {
    size_t begin, end;
  };
  class Search;

 private:
  struct Code;
  std::shared_ptr<const Code> code_;
};

// The matches of `regex` in valid UTF-8, one after the other. An empty match directly after a match
// is passed over.
class Regex::Search {
 public:
  // Both arguments must outlive the search.
  Search(const Regex& regex, std::string_view text);
  ~Search();
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  // Throws Error if the expression takes too many steps on this text.
  std::optional<Match> next();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mamba3
