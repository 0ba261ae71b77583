#include "train/feed.h"

#include <algorithm>
#include <bit>

#include "core/memory.h"

namespace mamba3 {

namespace {

// The words: the numbers, then B T ids, then B T targets.
constexpr int64_t kScale = 0, kNumbers = 1, kIds = 8;

}  // namespace

Feed::Feed(Device device, int64_t tokens)
    : device_(device),
      memory_(allocate_bytes(device, static_cast<size_t>(kIds + 2 * tokens) * sizeof(int32_t))) {}

void Feed::fill(Context& ctx, const Batch& batch, float scale, const AdamwNumbers& numbers) {
  const int64_t tokens = batch.B * batch.T;
  staged_.resize(static_cast<size_t>(kIds + 2 * tokens));
  const float floats[] = {scale, numbers.lr, numbers.decay, numbers.unbias1, numbers.unbias2};
  std::ranges::transform(floats, staged_.begin() + kScale,
                         [](float value) { return std::bit_cast<int32_t>(value); });
  std::ranges::copy(batch.tokens, staged_.begin() + kIds);
  std::ranges::copy(batch.targets, staged_.begin() + kIds + tokens);
  const int64_t words = std::ssize(staged_);
  copy(ctx, view_of(staged_.data(), {words}), make_view(at(0), DType::i32, {words}, device_));
}

std::byte* Feed::at(int64_t words) const {
  return static_cast<std::byte*>(memory_.get()) + words * int64_t{sizeof(int32_t)};
}

View Feed::scale() const {
  return make_view(at(kScale), DType::f32, {1}, device_);
}

View Feed::numbers() const {
  return make_view(at(kNumbers), DType::f32, {4}, device_);
}

View Feed::ids(int64_t B, int64_t T) const {
  return make_view(at(kIds), DType::i32, {B, T}, device_);
}

View Feed::targets(int64_t B, int64_t T) const {
  return make_view(at(kIds + B * T), DType::i32, {B * T}, device_);
}

}  // namespace mamba3
