#pragma once

#include <vector>

#include "bench/measure.h"
#include "model/tensors.h"
#include "ops/delta.h"
#include "ops/mixer.h"

namespace mamba3::bench {

// Every op with every case of the shared table (bench/cases.h), the base row of an op first. On the
// CPU activations are f32, and weights as a case says; on the GPU both are of the placement's type,
// and there are no cases for other ones.
std::vector<Benchmark> op_benchmarks(const Placement& placement = {});

// FLOPs of the chunked algorithm (paper, section 3.3, chunks of 64 rows): a row (t, r) meets the Q
// rows of its chunk in q.k and in the sum over v, and the state twice, once read and once written.
double mixer_scan_flops(const MixerShape& shape, int64_t tokens);
// Those of the chunked gated delta rule, chunks of 16 tokens: a token meets half its chunk in k.k,
// q.k, the system and the sum over its solution, and the state three times.
double delta_scan_flops(const DeltaShape& shape, int64_t tokens);

}  // namespace mamba3::bench
