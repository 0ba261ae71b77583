#pragma once

#include <filesystem>
#include <span>

#include "formats/tensor_file.h"

namespace mamba3 {

// A state dict that torch.save wrote (pytorch_model.bin): a zip archive of a pickle, read without
// executing anything, and raw storages, which stay mapped where they are stored dense. Tensors that
// share a storage share memory. Throws InputError, with the path, for anything but a whole and
// consistent file.
TensorFile read_torch(const std::filesystem::path& path);
// The same for bytes in memory that `owner` keeps; `source` names them in messages.
TensorFile read_torch(std::span<const std::byte> bytes, std::shared_ptr<const void> owner,
                      std::string_view source);

}  // namespace mamba3
