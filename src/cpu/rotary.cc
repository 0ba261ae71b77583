#include "ops/rotary.h"

#include <cmath>

#include "cpu/grain.h"
#include "cpu/packed.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/rotary.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

// Turns the pairs (a, b) of `half` channels each by angles of these cosines and sines.
void turn_pairs(float* a, float* b, const float* cosine, const float* sine, int64_t half) {
  for_each_vector(half, [&](auto access, int64_t i) HWY_ATTR {
    const Vector x = access.load(a + i), y = access.load(b + i);
    const Vector c = access.load(cosine + i), s = access.load(sine + i);
    access.store(hn::NegMulAdd(y, s, hn::Mul(x, c)), a + i);
    access.store(hn::MulAdd(y, c, hn::Mul(x, s)), b + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(turn_pairs);

void rotary(Context& ctx, const RotaryArgs& args) {
  const int64_t B = args.x.dim(0), T = args.x.dim(1), columns = args.x.dim(2);
  const int64_t d = args.d, half = args.dims / 2;
  ScratchScope scope(ctx.scratch);
  const TokenPlaces places = token_places(args.x, args.cu_seqlens, scope);
  const auto frequency = scope.take<double>(half);
  for (int64_t i = 0; i < half; ++i) {
    frequency[static_cast<size_t>(i)] =
        std::pow(args.base, -static_cast<double>(i) / static_cast<double>(half));
  }
  const auto tables = scope.take<float>(ctx.threads.size() * 2 * half);
  const int32_t* start = args.start.empty() ? nullptr : args.start.as<int32_t>();
  const auto turn = HWY_DYNAMIC_DISPATCH(turn_pairs);
  ctx.threads.parallel_for(B * T, grain_for(columns), [&](int64_t begin, int64_t end, int thread) {
    float* const cosine = tables.data() + thread * 2 * half;
    float* const sine = cosine + half;
    for (int64_t token = begin; token < end; ++token) {
      double position = places.position[static_cast<size_t>(token)];
      if (start != nullptr) position += start[places.sequence[static_cast<size_t>(token)]];
      if (args.inverse) position = -position;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * frequency[static_cast<size_t>(i)];
        cosine[i] = static_cast<float>(std::cos(angle));
        sine[i] = static_cast<float>(std::sin(angle));
      }
      float* const x = row_of_token(args.x, token);
      for (int64_t head = 0; head < columns; head += d) {
        turn(x + head, x + head + half, cosine, sine, half);
      }
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
