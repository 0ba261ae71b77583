#include "ops/embedding.h"

#include "cpu/convert.h"
#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/embedding.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void add_to(const float* x, float* sum, int64_t n) {
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Add(access.load(sum + i), access.load(x + i)), sum + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(add_to);

void embedding(Context& ctx, const EmbeddingArgs& args) {
  const int64_t M = args.ids.dim(0), D = args.weight.dim(1);
  const int32_t* ids = args.ids.as<int32_t>();
  const char* weight = static_cast<const char*>(args.weight.data);
  const int64_t row_bytes = D * size_of(args.weight.dtype);
  ctx.threads.parallel_for(M, grain_for(D), [&](int64_t begin, int64_t end, int) {
    for (int64_t m = begin; m < end; ++m)
      to_float_fast(weight + ids[m] * row_bytes, args.weight.dtype, args.out.as<float>() + m * D,
                    D);
  });
}

void embedding_backward(Context& ctx, const EmbeddingBackwardArgs& args) {
  // Threads share the columns, not the tokens: two tokens may have the same row. 64 columns are
  // whole cache lines of every row.
  constexpr int64_t kColumns = 64;
  const int64_t M = args.ids.dim(0), D = args.d_weight.dim(1);
  const int32_t* ids = args.ids.as<int32_t>();
  const auto add = HWY_DYNAMIC_DISPATCH(add_to);
  const int64_t grain = std::max(kColumns, grain_for(M));
  ctx.threads.parallel_for(D, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t m = 0; m < M; ++m) {
      add(args.d_out.as<float>() + m * D + begin, args.d_weight.as<float>() + ids[m] * D + begin,
          end - begin);
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
