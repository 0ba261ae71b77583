#pragma once

// The public API of mamba3.cpp: load a checkpoint folder (model.h), read and continue tokens
// (session.h), generate text (generate.h). Every function reports errors by throwing mamba3::Error
// or, if the input is at fault, its subclass InputError (error.h).

#include "mamba3/error.h"      // IWYU pragma: export
#include "mamba3/generate.h"   // IWYU pragma: export
#include "mamba3/model.h"      // IWYU pragma: export
#include "mamba3/session.h"    // IWYU pragma: export
#include "mamba3/tokenizer.h"  // IWYU pragma: export
