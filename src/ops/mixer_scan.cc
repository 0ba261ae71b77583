#include "ops/mixer_scan.h"

#include <algorithm>

#include "ops/packed.h"

namespace mamba3 {

int64_t mixer_scan_chunk(int64_t R) {
  return std::max<int64_t>(8, 64 / R);
}

void mixer_scan(Context& ctx, const MixerScanArgs& args) {
  const Check check("mixer_scan", ctx);
  const MixerShape& s = args.shape;
  check_mixer_shape(check, s);
  check_mixer_params(check, s, args.params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()});
  check.tensor("y", args.y, {B, T, s.d_inner()});
  check.disjoint("y", args.y, "proj", args.proj);
  const int64_t sequences = check_packed(check, args.proj, args.cu_seqlens);
  if (!args.state.empty()) check_mixer_state(check, s, args.state, sequences);
  check.that(args.chunk >= 0, "chunk must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::mixer_scan(ctx, args);
    case Device::cuda:
      return cuda::mixer_scan(ctx, args);
  }
}

void mixer_scan_backward(Context& ctx, const MixerScanBackwardArgs& args) {
  const Check check("mixer_scan_backward", ctx);
  const MixerShape& s = args.shape;
  check_mixer_shape(check, s);
  check_mixer_params(check, s, args.params);
  check_mixer_params(check, s, args.d_params);
  const int64_t B = args.proj.dim(0), T = args.proj.dim(1);
  check.tensor("proj", args.proj, {B, T, s.d_proj()});
  check.tensor("d_y", args.d_y, {B, T, s.d_inner()});
  check.tensor("d_proj", args.d_proj, {B, T, s.d_proj()});
  check.disjoint("d_proj", args.d_proj, "proj", args.proj);
  check.disjoint("d_proj", args.d_proj, "d_y", args.d_y);
  const int64_t sequences = check_packed(check, args.proj, args.cu_seqlens);
  if (!args.initial.empty()) check_mixer_state(check, s, args.initial, sequences);
  if (!args.d_state.empty()) check_mixer_state(check, s, args.d_state, sequences);
  check.that(args.chunk >= 0, "chunk must not be negative");
  switch (ctx.device) {
    case Device::cpu:
      return cpu::mixer_scan_backward(ctx, args);
    case Device::cuda:
      return cuda::mixer_scan_backward(ctx, args);
  }
}

}  // namespace mamba3
