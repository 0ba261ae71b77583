#include "ops/rms_norm.h"

#include <cmath>

#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rms_norm.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/column_sums-inl.h"
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void add_rows(const float* a, const float* b, float* sum, int64_t D) {
  for_each_vector(D, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Add(access.load(a + i), access.load(b + i)), sum + i);
  });
}

// residual (D), delta (D) or null -> residual_out (D) if there is a delta, out (D). Returns rstd.
float norm_row(const float* residual, const float* delta, const float* weight, float* residual_out,
               float* out, int64_t D, float eps) {
  if (delta != nullptr) add_rows(residual, delta, residual_out, D);
  const float* x = delta == nullptr ? residual : residual_out;
  const float rstd = 1.0f / std::sqrt(dot(x, x, D) / static_cast<float>(D) + eps);
  const Vector scale = hn::Set(kLanes, rstd);
  for_each_vector(D, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Mul(hn::Mul(access.load(x + i), scale), access.load(weight + i)), out + i);
  });
  return rstd;
}

// With n = x rstd and d_n = d_out weight:
//   d_residual += rstd (d_n - n mean(d_n n)),   d_weight += d_out n.
void norm_backward_row(const float* x, const float* weight, float rstd, const float* d_out,
                       float* d_residual, float* d_weight, int64_t D) {
  Vector sum = hn::Zero(kLanes);
  const Vector scale = hn::Set(kLanes, rstd);
  for_each_vector(D, [&](auto access, int64_t i) HWY_ATTR {
    const Vector d_n_x =
        hn::Mul(hn::Mul(access.load(d_out + i), access.load(weight + i)), access.load(x + i));
    sum = hn::Add(sum, d_n_x);
  });
  const Vector along = hn::Set(kLanes, sum_of(sum) * rstd * rstd / static_cast<float>(D));
  for_each_vector(D, [&](auto access, int64_t i) HWY_ATTR {
    const Vector d = access.load(d_out + i), v = access.load(x + i);
    const Vector across = hn::NegMulAdd(v, along, hn::Mul(d, access.load(weight + i)));
    access.store(hn::MulAdd(across, scale, access.load(d_residual + i)), d_residual + i);
    access.store(hn::MulAdd(d, hn::Mul(v, scale), access.load(d_weight + i)), d_weight + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(norm_row);
HWY_EXPORT(norm_backward_row);
HWY_EXPORT(add_partials);

namespace {

// d_weight is summed over blocks of this many rows, then over the blocks in order, so that it does
// not depend on the number of threads.
constexpr int64_t kRowsPerBlock = 64;

float* row_of(const View& view, int64_t m) {
  return view.empty() ? nullptr : view.as<float>() + m * view.stride(0);
}

}  // namespace

void rms_norm(Context& ctx, const RmsNormArgs& args) {
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  const auto run_row = HWY_DYNAMIC_DISPATCH(norm_row);
  ctx.threads.parallel_for(M, grain_for(D), [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m) {
      const float rstd =
          run_row(row_of(args.residual, m), row_of(args.delta, m), args.weight.as<float>(),
                  row_of(args.residual_out, m), row_of(args.out, m), D, args.eps);
      if (!args.rstd.empty()) args.rstd.as<float>()[m] = rstd;
    }
  });
}

void rms_norm_backward(Context& ctx, const RmsNormBackwardArgs& args) {
  const int64_t M = args.residual.dim(0), D = args.residual.dim(1);
  const int64_t blocks = (M + kRowsPerBlock - 1) / kRowsPerBlock;
  ScratchScope scope(ctx.scratch);
  const auto partial = scope.take<float>(blocks * D);  // (blocks, D)
  const auto run_row = HWY_DYNAMIC_DISPATCH(norm_backward_row);
  ctx.threads.parallel_for(M, kRowsPerBlock, [&](int64_t begin, int64_t end, int) {
    float* sum = partial.data() + begin / kRowsPerBlock * D;
    std::fill_n(sum, D, 0.0f);
    for (int64_t m = begin; m < end; ++m) {
      run_row(row_of(args.residual, m), args.weight.as<float>(), args.rstd.as<float>()[m],
              row_of(args.d_out, m), row_of(args.d_residual, m), sum, D);
      if (!args.d_residual_copy.empty())
        std::copy_n(row_of(args.d_residual, m), D, row_of(args.d_residual_copy, m));
    }
  });
  const auto add = HWY_DYNAMIC_DISPATCH(add_partials);
  ctx.threads.parallel_for(D, grain_for(blocks), [&](int64_t begin, int64_t end, int) {
    add(partial.data() + begin, blocks, D, args.d_weight.as<float>() + begin, end - begin);
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
