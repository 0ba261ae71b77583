#include "ops/delta_scan.h"

#include <algorithm>

#include "ops/packed.h"

namespace mamba3 {

int64_t delta_scan_chunk(Device device) {
  return device == Device::cuda ? 16 : 32;
}

int64_t delta_scan_blocks(int64_t tasks, int64_t floats) {
  constexpr int64_t kFloats = int64_t{128} << 20;  // 512 MiB
  return std::min(tasks, std::max<int64_t>(1, kFloats / std::max<int64_t>(1, floats)));
}

void delta_scan(Context& ctx, const DeltaScanArgs& args) {
  const Check check("delta_scan", ctx);
  const DeltaShape& s = args.shape;
  check_delta_shape(check, s);
  check_delta_params(check, s, args.params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()}, check.activation_types());
  check.tensor("y", args.y, {B, T, s.d_inner()}, {args.proj.dtype});
  check.disjoint("y", args.y, "proj", args.proj);
  const int64_t sequences = check_packed(check, args.proj, args.cu_seqlens);
  if (!args.state.empty()) check_delta_state(check, s, args.state, sequences);
  check.that(args.chunk >= 0, "chunk must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::delta_scan(ctx, args);
    case Device::cuda:
      return cuda::delta_scan(ctx, args);
  }
}

void delta_scan_backward(Context& ctx, const DeltaScanBackwardArgs& args) {
  const Check check("delta_scan_backward", ctx);
  const DeltaShape& s = args.shape;
  check_delta_shape(check, s);
  check_delta_params(check, s, args.params);
  check_delta_params(check, s, args.d_params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()}, check.activation_types());
  check.tensor("d_y", args.d_y, {B, T, s.d_inner()}, {args.proj.dtype});
  check.tensor("d_proj", args.d_proj, {B, T, s.d_proj()}, {args.proj.dtype});
  check.disjoint("d_proj", args.d_proj, "proj", args.proj);
  check.disjoint("d_proj", args.d_proj, "d_y", args.d_y);
  check_packed(check, args.proj, args.cu_seqlens);
  check.that(args.chunk >= 0, "chunk must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::delta_scan_backward(ctx, args);
    case Device::cuda:
      return cuda::delta_scan_backward(ctx, args);
  }
}

}  // namespace mamba3
