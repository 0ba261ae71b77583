#pragma once

#include <string>

#include "model/language_model.h"

namespace mamba3 {

// Tells models apart: 16 hexadecimal digits over the configuration (the decay's dialect included)
// and, of every parameter, the name, dims, type and about a thousand bytes spread over its values.
// Cheap for a mapped model of any size, and different after any step of training.
std::string fingerprint(const LanguageModel& model);

}  // namespace mamba3
