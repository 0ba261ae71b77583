#pragma once

#include <map>
#include <string>
#include <string_view>

namespace mamba3 {

// The index of a checkpoint in several files (model.safetensors.index.json): which file, a name
// without folders, holds each tensor. Throws InputError that begins with `source`.
std::map<std::string, std::string> parse_shard_index(std::string_view json,
                                                     std::string_view source);

}  // namespace mamba3
