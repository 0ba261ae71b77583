#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mamba3 {

// Looks for stop texts in a text that comes in pieces, and holds back what may be the beginning of
// one.
class StopScanner {
 public:
  // Throws InputError for an empty stop text.
  explicit StopScanner(std::vector<std::string> stops);

  // What can be shown after this piece: everything before a stop text, if one is now complete
  // (then stopped()), else everything that cannot belong to one.
  std::string push(std::string_view piece);
  bool stopped() const { return stopped_; }
  // What was held back, when the text ends.
  std::string finish();

 private:
  std::vector<std::string> stops_;
  std::string pending_;
  bool stopped_ = false;
};

}  // namespace mamba3
