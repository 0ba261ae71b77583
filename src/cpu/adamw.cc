#include "ops/adamw.h"

#include <cmath>

#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/adamw.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

#ifndef MAMBA3_CPU_ADAMW_ONCE  // not once a target
#define MAMBA3_CPU_ADAMW_ONCE
namespace mamba3::cpu {
namespace {

// The numbers of one update, the same for every element.
struct Update {
  float clip;  // factor of the gradient
  float beta1, beta2, eps;
  AdamwNumbers now;
};

}  // namespace
}  // namespace mamba3::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

float sum_of_squares(const float* x, int64_t n) {
  return dot(x, x, n);
}

void update_elements(const Update& u, float* param, const float* grad, float* m, float* v,
                     int64_t n) {
  const auto all = [](float value) HWY_ATTR { return hn::Set(kLanes, value); };
  const Vector clip = all(u.clip), beta1 = all(u.beta1), beta2 = all(u.beta2);
  const Vector rest1 = all(1 - u.beta1), rest2 = all(1 - u.beta2), eps = all(u.eps);
  const Vector rate = all(u.now.lr * u.now.unbias1), unbias2 = all(u.now.unbias2);
  const Vector decay = all(u.now.decay);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector g = hn::Mul(access.load(grad + i), clip);
    const Vector m_new = hn::MulAdd(beta1, access.load(m + i), hn::Mul(rest1, g));
    const Vector v_new = hn::MulAdd(beta2, access.load(v + i), hn::Mul(rest2, hn::Mul(g, g)));
    const Vector step =
        hn::Div(hn::Mul(rate, m_new), hn::Add(hn::Sqrt(hn::Mul(v_new, unbias2)), eps));
    const Vector p = access.load(param + i);
    access.store(hn::Sub(p, hn::MulAdd(decay, p, step)), param + i);
    access.store(m_new, m + i);
    access.store(v_new, v + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(sum_of_squares);
HWY_EXPORT(update_elements);

namespace {

// A piece of one tensor. The norm is summed within pieces and then over them in order, so that it
// does not depend on the number of threads.
struct Piece {
  const AdamwTensor* tensor;
  int64_t begin, size;
};

std::span<Piece> cut_into_pieces(std::span<const AdamwTensor> tensors, ScratchScope& scope) {
  const auto count = [](const AdamwTensor& tensor) {
    return (tensor.param.size() + kGrainElements - 1) / kGrainElements;
  };
  int64_t total = 0;
  for (const AdamwTensor& tensor : tensors) total += count(tensor);
  const auto pieces = scope.take<Piece>(total);
  size_t next = 0;
  for (const AdamwTensor& tensor : tensors) {
    const int64_t n = tensor.param.size();
    for (int64_t begin = 0; begin < n; begin += kGrainElements)
      pieces[next++] = {&tensor, begin, std::min(kGrainElements, n - begin)};
  }
  return pieces;
}

double global_norm(Context& ctx, std::span<const Piece> pieces, ScratchScope& scope) {
  const auto partial = scope.take<float>(static_cast<int64_t>(pieces.size()));
  const auto squares = HWY_DYNAMIC_DISPATCH(sum_of_squares);
  ctx.threads.parallel_for(static_cast<int64_t>(pieces.size()), 1, [&](int64_t i, int64_t, int) {
    const Piece& piece = pieces[static_cast<size_t>(i)];
    partial[static_cast<size_t>(i)] =
        squares(piece.tensor->grad.as<float>() + piece.begin, piece.size);
  });
  double sum = 0;
  for (const float squares_of_piece : partial) sum += static_cast<double>(squares_of_piece);
  return std::sqrt(sum);
}

AdamwNumbers numbers_of(const AdamwArgs& args) {
  if (args.numbers.empty()) return adamw_numbers(args);
  const float* const n = args.numbers.as<float>();
  return {.lr = n[0], .decay = n[1], .unbias1 = n[2], .unbias2 = n[3]};
}

Update update_for(const AdamwArgs& args, double norm) {
  const double clip = args.clip > 0 ? static_cast<double>(args.clip) : norm;
  return {.clip = norm > clip ? static_cast<float>(clip / norm) : 1.0f,
          .beta1 = args.beta1,
          .beta2 = args.beta2,
          .eps = args.eps,
          .now = numbers_of(args)};
}

}  // namespace

void adamw(Context& ctx, const AdamwArgs& args) {
  ScratchScope scope(ctx.scratch);
  const auto pieces = cut_into_pieces(args.tensors, scope);
  const double norm = global_norm(ctx, pieces, scope);
  *args.grad_norm.as<float>() = static_cast<float>(norm);
  if (!std::isfinite(norm)) return;
  if (!args.loss.empty() && !std::isfinite(*args.loss.as<double>())) return;
  const Update decayed = update_for(args, norm);
  Update plain = decayed;
  plain.now.decay = 0;
  const auto update = HWY_DYNAMIC_DISPATCH(update_elements);
  ctx.threads.parallel_for(static_cast<int64_t>(pieces.size()), 1, [&](int64_t i, int64_t, int) {
    const auto& [tensor, begin, size] = pieces[static_cast<size_t>(i)];
    update(tensor->decay ? decayed : plain, tensor->param.as<float>() + begin,
           tensor->grad.as<float>() + begin, tensor->m.as<float>() + begin,
           tensor->v.as<float>() + begin, size);
    if (!tensor->low.empty()) {
      from_float(tensor->param.as<float>() + begin, tensor->low.as<bf16>() + begin, DType::bf16,
                 size);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
