#pragma once

#include <cstdint>

#include "core/context.h"
#include "model/config.h"
#include "model/tensors.h"

namespace mamba3 {

// Fresh f32 parameters: parameter_table() allocated and filled as its Init column says (design of
// the reference package):
//   normal        N(0, 0.02), the embedding
//   fan_in        uniform in +-1/sqrt(columns), matrices
//   residual_out  fan_in / sqrt(number of residual branches), out_proj and fc2
//   inverse_rank  1/R, mimo_x and mimo_o
//   dt_bias       inverse softplus of a log-uniform draw from [dt_min, dt_max], not below
//                 dt_init_floor
// A tensor's values depend on the seed and its name alone, not on the number of threads.
NamedTensors init_parameters(Context& ctx, const Config& config, uint64_t seed);

}  // namespace mamba3
