#pragma once

#include "core/check.h"

namespace mamba3 {

// Packed sequences: cu_seqlens (n+1) i32 rises from 0 to T, and sequence i is positions
// [cu_seqlens[i], cu_seqlens[i+1]) of the one row of `batch` (1, T, ...). Without cu_seqlens, every
// row of `batch` (B, T, ...) is a sequence.
inline int64_t sequence_count(const View& batch, const View& cu_seqlens) {
  return cu_seqlens.empty() ? batch.dim(0) : cu_seqlens.dim(0) - 1;
}
// Checks that, and returns the number of sequences.
int64_t check_packed(const Check& check, const View& batch, const View& cu_seqlens);

}  // namespace mamba3
