#pragma once

#include "core/context.h"
#include "core/view.h"

namespace mamba3 {

// Copies a contiguous view of host memory to one of the same size on any device, whose type may be
// another floating one.
void copy_converted(Context& ctx, const View& from, const View& to);

}  // namespace mamba3
