#include "ops/grouped_rms_norm.h"

#include <cmath>

#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/grouped_rms_norm.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/column_sums-inl.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

float rstd_of(const float* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
}

// Of a group of n channels of a row; out may be x.
void norm_group(const float* x, const float* weight, float* out, int64_t n, float eps) {
  const Vector rstd = hn::Set(kLanes, rstd_of(x, n, eps));
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Mul(hn::Mul(access.load(x + i), rstd), access.load(weight + i)), out + i);
  });
}

// With n = x rstd and d_n = d_out weight:
//   d_x = rstd (d_n - n mean(d_n n)),   d_weight += d_out n.
// d_x may be d_out.
void norm_group_backward(const float* x, const float* weight, const float* d_out, float* d_x,
                         float* d_weight, int64_t n, float eps) {
  Vector sum = hn::Zero(kLanes);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector d_n = hn::Mul(access.load(d_out + i), access.load(weight + i));
    sum = hn::MulAdd(d_n, access.load(x + i), sum);
  });
  const float rstd = rstd_of(x, n, eps);
  const Vector scale = hn::Set(kLanes, rstd);
  const Vector along = hn::Set(kLanes, sum_of(sum) * rstd / static_cast<float>(n));
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector d = access.load(d_out + i), normed = hn::Mul(access.load(x + i), scale);
    const Vector across = hn::NegMulAdd(normed, along, hn::Mul(d, access.load(weight + i)));
    access.store(hn::Mul(across, scale), d_x + i);
    access.store(hn::MulAdd(d, normed, access.load(d_weight + i)), d_weight + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(norm_group);
HWY_EXPORT(norm_group_backward);
HWY_EXPORT(add_partials);

namespace {

// d_weight is summed over blocks of this many rows, then over the blocks in order, so that it does
// not depend on the number of threads.
constexpr int64_t kRowsPerBlock = 64;

float* row_of(const View& view, int64_t m) {
  return view.as<float>() + m * view.stride(0);
}

}  // namespace

void grouped_rms_norm(Context& ctx, const GroupedRmsNormArgs& args) {
  const int64_t M = args.x.dim(0), C = args.x.dim(1), width = C / args.groups;
  const float* weight = args.weight.as<float>();
  const auto run_group = HWY_DYNAMIC_DISPATCH(norm_group);
  ctx.threads.parallel_for(M, grain_for(C), [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      const float* x = row_of(args.x, m);
      float* out = row_of(args.out, m);
      for (int64_t i = 0; i < C; i += width) run_group(x + i, weight + i, out + i, width, args.eps);
    }
  });
}

void grouped_rms_norm_backward(Context& ctx, const GroupedRmsNormBackwardArgs& args) {
  const int64_t M = args.x.dim(0), C = args.x.dim(1), width = C / args.groups;
  const int64_t blocks = (M + kRowsPerBlock - 1) / kRowsPerBlock;
  ScratchScope scope(ctx.scratch);
  const auto partial = scope.take<float>(blocks * C);  // (blocks, C)
  const float* weight = args.weight.as<float>();
  const auto run_group = HWY_DYNAMIC_DISPATCH(norm_group_backward);
  ctx.threads.parallel_for(M, kRowsPerBlock, [&](int64_t begin, int64_t end, int) {
    float* sum = partial.data() + begin / kRowsPerBlock * C;
    std::fill_n(sum, C, 0.0f);
    for (int64_t m = begin; m < end; ++m) {
      const float *x = row_of(args.x, m), *d_out = row_of(args.d_out, m);
      float* d_x = row_of(args.d_x, m);
      for (int64_t i = 0; i < C; i += width)
        run_group(x + i, weight + i, d_out + i, d_x + i, sum + i, width, args.eps);
    }
  });
  const auto add = HWY_DYNAMIC_DISPATCH(add_partials);
  ctx.threads.parallel_for(C, grain_for(blocks), [&](int64_t begin, int64_t end, int) {
    add(partial.data() + begin, blocks, C, args.d_weight.as<float>() + begin, end - begin);
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
