#pragma once

#include "core/context.h"

namespace mamba3 {

// total += sum(values), in double and in an order that depends on their number only: the loss of a
// batch, where no host has to wait for it.
struct AddSumArgs {
  View values;  // (n) f32
  View total;   // (1) f64
};

void add_sum(Context& ctx, const AddSumArgs& args);

namespace cpu {
void add_sum(Context& ctx, const AddSumArgs& args);
}  // namespace cpu
namespace cuda {
void add_sum(Context& ctx, const AddSumArgs& args);
}  // namespace cuda

}  // namespace mamba3
