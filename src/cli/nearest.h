#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace mamba3::cli {

// The candidate that `word` was most likely meant to be, for "did you mean"; empty when none is
// close: more than a third of the word's characters would have to change.
std::string nearest(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace mamba3::cli
