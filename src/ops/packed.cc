#include "ops/packed.h"

#include <algorithm>

namespace mamba3 {

int64_t check_packed(const Check& check, const View& batch, const View& cu_seqlens) {
  const int64_t n = sequence_count(batch, cu_seqlens);
  if (cu_seqlens.empty()) return n;
  check.dense("cu_seqlens", cu_seqlens, {n + 1}, {DType::i32});
  check.that(n >= 0 && batch.dim(0) == 1, "cu_seqlens needs B = 1 and at least one entry");
  if (cu_seqlens.device == Device::cpu) {
    const int32_t* cu = cu_seqlens.as<int32_t>();
    check.that(cu[0] == 0 && cu[n] == batch.dim(1) && std::is_sorted(cu, cu + n + 1),
               "cu_seqlens must rise from 0 to T");
  }
  return n;
}

}  // namespace mamba3
