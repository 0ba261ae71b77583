#pragma once

#include <filesystem>

#include "mamba3/session.h"

namespace mamba3 {

// A session as a safetensors file, written whole or not at all. Tensors: the row of every state
// tensor (see model/state.h; caches up to the last token), `hidden` (D), from which the next
// logits come, and `recent` (n) i32, the tokens that a repeat penalty looks at. Metadata: `format`
// "mamba3-state", `format_version`, `model` (see fingerprint.h), `tokens`, their number.

// Throws InputError for a session without tokens, Error if the file cannot be written.
void save_state(const std::filesystem::path& file, Session::Impl& session);

// Throws InputError, having changed nothing, for a file that is not the whole state of this model.
void load_state(const std::filesystem::path& file, Session::Impl& session);

}  // namespace mamba3
