#include "ops/short_conv.h"

#include <algorithm>
#include <array>

#include "cpu/grain.h"
#include "cpu/packed.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/short_conv.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

// bias + sum_j weight[j] in[j] of the channels from i on: `count` rows of inputs, oldest first, and
// of weights (count, C). bias may be null.
template <typename Access>
HWY_INLINE Vector sum_of_taps(Access access, const float* const* in, const float* weight,
                              const float* bias, int64_t count, int64_t C, int64_t i) {
  Vector sum = bias == nullptr ? hn::Zero(kLanes) : access.load(bias + i);
  for (int64_t j = 0; j < count; ++j) {
    sum = hn::MulAdd(access.load(weight + j * C + i), access.load(in[j] + i), sum);
  }
  return sum;
}

void conv_row(const float* const* in, const float* weight, const float* bias, int64_t count,
              float* out, int64_t C) {
  for_each_vector(C, [&](auto access, int64_t i) HWY_ATTR {
    access.store(silu(sum_of_taps(access, in, weight, bias, count, C, i)), out + i);
  });
}

// The gradient of the sum under the SiLU: d_out silu'(sum), with silu'(x) = s (1 + x (1 - s)), s =
// sigmoid(x).
void conv_gradient_row(const float* const* in, const float* weight, const float* bias,
                       int64_t count, const float* d_out, float* d_sum, int64_t C) {
  const Vector one = hn::Set(kLanes, 1.0f);
  for_each_vector(C, [&](auto access, int64_t i) HWY_ATTR {
    const Vector x = sum_of_taps(access, in, weight, bias, count, C, i), s = sigmoid(x);
    const Vector slope = hn::Mul(s, hn::MulAdd(x, hn::Sub(one, s), one));
    access.store(hn::Mul(access.load(d_out + i), slope), d_sum + i);
  });
}

// d_weight[j] += d_sum in[j] of `count` rows, d_bias += d_sum.
void add_weight_gradient(const float* const* in, const float* d_sum, int64_t count, float* d_weight,
                         float* d_bias, int64_t C) {
  for_each_vector(C, [&](auto access, int64_t i) HWY_ATTR {
    const Vector d = access.load(d_sum + i);
    for (int64_t j = 0; j < count; ++j) {
      float* const target = d_weight + j * C + i;
      access.store(hn::MulAdd(d, access.load(in[j] + i), access.load(target)), target);
    }
    access.store(hn::Add(access.load(d_bias + i), d), d_bias + i);
  });
}

// d_in = sum_j weight[j] d_sum[j], rows as in sum_of_taps().
void input_gradient_row(const float* const* d_sum, const float* weight, int64_t count, float* d_in,
                        int64_t C) {
  for_each_vector(C, [&](auto access, int64_t i) HWY_ATTR {
    access.store(sum_of_taps(access, d_sum, weight, nullptr, count, C, i), d_in + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(conv_row);
HWY_EXPORT(conv_gradient_row);
HWY_EXPORT(add_weight_gradient);
HWY_EXPORT(input_gradient_row);

namespace {

// d_weight and d_bias are summed over blocks of this many tokens, then over the blocks in order, so
// that they do not depend on the number of threads.
constexpr int64_t kTokensPerBlock = 64;

using Rows = std::array<const float*, kWidestConv>;  // one a tap, oldest first

const float* pointer(const View& view) {
  return view.empty() ? nullptr : view.as<float>();
}

// (C, W) -> (W, C): a tap's weights side by side, as channels are.
std::span<float> taps_of(const View& weight, ScratchScope& scratch) {
  const int64_t C = weight.dim(0), W = weight.dim(1);
  const auto taps = scratch.take<float>(C * W);
  const float* from = weight.as<float>();
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t j = 0; j < W; ++j) taps[static_cast<size_t>(j * C + c)] = from[c * W + j];
  }
  return taps;
}

// The columns that are not channels.
void copy_others(const float* from, float* to, int64_t first, int64_t C, int64_t X) {
  std::copy_n(from, first, to);
  std::copy(from + first + C, from + X, to + first + C);
}

// Row k of the inputs that a sequence of the batch keeps.
float* kept_row(const ShortConvState& state, int64_t sequence, int64_t k) {
  const int64_t rows = state.inputs.dim(1), C = state.inputs.dim(2);
  return state.inputs.as<float>() + (state.rows.as<int32_t>()[sequence] * rows + k) * C;
}

// The inputs of the last tokens become the state; those of a short sequence come behind what it
// has.
void keep_inputs(const ShortConvArgs& args, int64_t sequence, int64_t first_token, int64_t length) {
  const int64_t kept = args.weight.dim(1) - 1, C = args.weight.dim(0);
  if (length == 0) return;
  for (int64_t k = 0; k < kept; ++k) {
    const int64_t t = length - kept + k;
    const float* from = t < 0 ? kept_row(args.state, sequence, k + length)
                              : row_of_token(args.in, first_token + t) + args.first;
    std::copy_n(from, C, kept_row(args.state, sequence, k));
  }
}

}  // namespace

void short_conv(Context& ctx, const ShortConvArgs& args) {
  const int64_t B = args.in.dim(0), T = args.in.dim(1), X = args.in.dim(2);
  const int64_t C = args.weight.dim(0), W = args.weight.dim(1);
  ScratchScope scope(ctx.scratch);
  const TokenPlaces places = token_places(args.in, args.cu_seqlens, scope);
  const auto taps = taps_of(args.weight, scope);
  const auto run_row = HWY_DYNAMIC_DISPATCH(conv_row);
  ctx.threads.parallel_for(B * T, grain_for(C * W + X), [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = places.position[static_cast<size_t>(token)];
      const int64_t sequence = places.sequence[static_cast<size_t>(token)];
      const int64_t count = args.state.empty() ? std::min(W, position + 1) : W;
      Rows in{};
      for (int64_t j = 0; j < count; ++j) {
        const int64_t before = count - 1 - j;  // so many tokens
        in[static_cast<size_t>(j)] =
            before <= position ? row_of_token(args.in, token - before) + args.first
                               : kept_row(args.state, sequence, W - 1 - (before - position));
      }
      float* const out = row_of_token(args.out, token);
      copy_others(row_of_token(args.in, token), out, args.first, C, X);
      run_row(in.data(), taps.data() + (W - count) * C, pointer(args.bias), count, out + args.first,
              C);
    }
  });
  if (args.state.empty()) return;
  const int64_t sequences = args.state.rows.dim(0);
  const int32_t* cu = args.cu_seqlens.empty() ? nullptr : args.cu_seqlens.as<int32_t>();
  ctx.threads.parallel_for(sequences, grain_for(C * W), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (cu == nullptr) {
        keep_inputs(args, i, i * T, T);
      } else {
        keep_inputs(args, i, cu[i], cu[i + 1] - cu[i]);
      }
    }
  });
}

void short_conv_backward(Context& ctx, const ShortConvBackwardArgs& args) {
  const int64_t B = args.in.dim(0), T = args.in.dim(1), X = args.in.dim(2);
  const int64_t C = args.weight.dim(0), W = args.weight.dim(1), tokens = B * T;
  const int64_t blocks = (tokens + kTokensPerBlock - 1) / kTokensPerBlock;
  const int64_t sums = (W + 1) * C;  // of a block: d_weight (W, C), d_bias (C)
  ScratchScope scope(ctx.scratch);
  const TokenPlaces places = token_places(args.in, args.cu_seqlens, scope);
  const auto taps = taps_of(args.weight, scope);
  const auto partial = scope.take<float>(blocks * sums);
  // Of a thread: gradients of the sums of its block's tokens, and of those that read their inputs.
  const int64_t d_sum_size = (kTokensPerBlock + W - 1) * C;
  const auto d_sum_memory = scope.take<float>(ctx.threads.size() * d_sum_size);
  const auto gradient_row = HWY_DYNAMIC_DISPATCH(conv_gradient_row);
  const auto add_gradient = HWY_DYNAMIC_DISPATCH(add_weight_gradient);
  const auto input_row = HWY_DYNAMIC_DISPATCH(input_gradient_row);
  const auto position = [&](int64_t token) {
    return int64_t{places.position[static_cast<size_t>(token)]};
  };
  ctx.threads.parallel_for(tokens, kTokensPerBlock, [&](int64_t begin, int64_t end, int thread) {
    float* const d_weight = partial.data() + begin / kTokensPerBlock * sums;
    float* const d_bias = d_weight + W * C;
    float* const d_sum = d_sum_memory.data() + thread * d_sum_size;  // of `begin`
    std::fill_n(d_weight, sums, 0.0f);
    for (int64_t token = begin; token < std::min(tokens, end + W - 1); ++token) {
      const int64_t count = std::min(W, position(token) + 1);
      // Its sequence begins behind the block: nor does any other token from here on read from it.
      if (token - position(token) >= end) break;
      Rows in{};
      for (int64_t j = 0; j < count; ++j) {
        in[static_cast<size_t>(j)] = row_of_token(args.in, token - (count - 1 - j)) + args.first;
      }
      float* const d = d_sum + (token - begin) * C;
      gradient_row(in.data(), taps.data() + (W - count) * C, pointer(args.bias), count,
                   row_of_token(args.d_out, token) + args.first, d, C);
      if (token < end) add_gradient(in.data(), d, count, d_weight + (W - count) * C, d_bias, C);
    }
    for (int64_t token = begin; token < end; ++token) {
      // The token itself and those of its sequence that it is an input of, the last one first, as
      // that reads it by the oldest tap.
      int64_t count = 1;
      while (count < W && token + count < tokens && position(token + count) >= count) ++count;
      Rows readers{};
      for (int64_t j = 0; j < count; ++j) {
        readers[static_cast<size_t>(j)] = d_sum + (token - begin + count - 1 - j) * C;
      }
      float* const d_in = row_of_token(args.d_in, token);
      copy_others(row_of_token(args.d_out, token), d_in, args.first, C, X);
      input_row(readers.data(), taps.data() + (W - count) * C, count, d_in + args.first, C);
    }
  });
  if (blocks == 0) return;
  ctx.threads.parallel_for(C, grain_for(blocks * (W + 1)), [&](int64_t begin, int64_t end, int) {
    for (int64_t j = 0; j <= W; ++j) {
      if (j == W && args.d_bias.empty()) return;
      float* const total = partial.data() + j * C;  // of the first block
      for (int64_t block = 1; block < blocks; ++block) {
        const float* const more = total + block * sums;
        for (int64_t c = begin; c < end; ++c) total[c] += more[c];
      }
      for (int64_t c = begin; c < end; ++c) {
        (j < W ? args.d_weight.as<float>()[c * W + j] : args.d_bias.as<float>()[c]) += total[c];
      }
    }
  });
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
