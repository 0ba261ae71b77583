#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "formats/tensor_file.h"

namespace mamba3 {

// The safetensors format: 8 bytes of header length, a JSON header {name: {dtype, shape,
// data_offsets}, "__metadata__": {...}}, then the data without gaps. Types: F32, BF16, F16, F64,
// I32, I64, U8.

// Maps a file. Throws InputError, with the path and the tensor, for anything but a whole and
// consistent file.
TensorFile read_safetensors(const std::filesystem::path& path);
// The same for bytes in memory that `owner` keeps; `source` names them in messages.
TensorFile read_safetensors(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                            std::string_view source);

struct NamedView {
  std::string name;
  View view;  // dense
};

class AtomicFile;

// Writes tensors in the order given, but the larger elements first, so that every one is aligned.
// Throws Error if the disk is full or the like: `path` is then as it was before.
void write_safetensors(const std::filesystem::path& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata = {});
// The same into a file that the caller commits.
void write_safetensors(AtomicFile& file, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace mamba3
