// Every filter keeps the first tokens of the order "larger logit first, lower id first on a tie",
// so it is known by its last token, the cut. No filter sorts: the cuts of top-k and top-p are found
// by selection among the few logits that can matter. What is cut off becomes -inf in a copy of the
// row, and the draw walks the copy in the order of ids, in blocks whose sums it takes first.

#include "ops/sample.h"

#include <cmath>
#include <limits>

#include "core/error.h"
#include "core/random.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/sample.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

#ifndef MAMBA3_CPU_SAMPLE_ONCE  // not once a target
#define MAMBA3_CPU_SAMPLE_ONCE
namespace mamba3::cpu {
namespace {

struct Candidate {
  float logit;
  int32_t id;
};

}  // namespace
}  // namespace mamba3::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

// The largest of x, or NaN if one is NaN or infinite. -inf is a token that must not be drawn.
float largest(const float* x, int64_t n) {
  const Vector infinity = hn::Inf(kLanes);
  Vector most = hn::Neg(infinity), bad = hn::Zero(kLanes);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector value = access.load(x + i);
    bad = hn::IfThenElse(hn::Lt(value, infinity), bad, hn::Set(kLanes, 1.0f));
    most = hn::Max(most, access.keep(value, most));
  });
  return max_of(bad) > 0 ? std::numeric_limits<float>::quiet_NaN() : max_of(most);
}

// sum_i exp((x_i - shift) rate) over x_i > threshold
float sum_of_exp(const float* x, int64_t n, float shift, float rate, float threshold) {
  const Vector s = hn::Set(kLanes, shift), r = hn::Set(kLanes, rate);
  const Vector least = hn::Set(kLanes, threshold);
  Vector sum = hn::Zero(kLanes);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector value = access.keep(access.load(x + i), least);
    const auto counts = hn::Gt(value, least);
    if (hn::AllFalse(kLanes, counts)) return;
    const Vector e = exp(hn::Mul(hn::Sub(value, s), r));
    sum = hn::Add(sum, hn::IfThenElseZero(counts, e));
  });
  return sum_of(sum);
}

// Appends the tokens of [begin, end) with x > threshold to found; returns their number.
int64_t collect(const float* x, int64_t begin, int64_t end, float threshold, Candidate* found) {
  const Vector least = hn::Set(kLanes, threshold);
  int64_t count = 0;
  for_each_vector(end - begin, [&](auto access, int64_t i) HWY_ATTR {
    const float* from = x + begin + i;
    if (hn::AllFalse(kLanes, hn::Gt(access.keep(access.load(from), least), least))) return;
    for (int64_t j = 0; j < std::min(lane_count(), end - begin - i); ++j) {
      if (from[j] > threshold) found[count++] = {from[j], static_cast<int32_t>(begin + i + j)};
    }
  });
  return count;
}

// x = -inf where x < threshold.
void cut_below(float* x, int64_t n, float threshold) {
  const Vector least = hn::Set(kLanes, threshold), none = hn::Neg(hn::Inf(kLanes));
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector value = access.load(x + i);
    access.store(hn::IfThenElse(hn::Lt(value, least), none, value), x + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(largest);
HWY_EXPORT(sum_of_exp);
HWY_EXPORT(collect);
HWY_EXPORT(cut_below);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 1024;

bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// One row of logits on its way to a token.
class Row {
 public:
  // logits is changed; candidates has room for as many.
  Row(std::span<float> logits, std::span<Candidate> candidates)
      : x_(logits.data()),
        n_(static_cast<int64_t>(logits.size())),
        candidates_(candidates.data()) {}

  // The chosen token, or -1 if the logits are not finite.
  int32_t choose(const SampleArgs& args, int64_t b) {
    if (!args.history.empty()) penalise(args, b);
    max_ = HWY_DYNAMIC_DISPATCH(largest)(x_, n_);
    if (!std::isfinite(max_)) return -1;
    if (args.temperature == 0) return static_cast<int32_t>(std::find(x_, x_ + n_, max_) - x_);
    if (args.top_k > 0) keep_top_k(args.top_k);
    if (args.top_p < 1) keep_top_p(static_cast<double>(args.top_p));
    if (args.min_p > 0) HWY_DYNAMIC_DISPATCH(cut_below)(x_, n_, max_ + std::log(args.min_p));
    const double uniform =
        Random(args.seed, args.position + step_of(args, b), row_of(args, b)).uniform();
    return draw(uniform, std::min(1 / args.temperature, std::numeric_limits<float>::max()));
  }

 private:
  static uint64_t step_of(const SampleArgs& args, int64_t b) {
    if (args.step.empty()) return 0;
    return static_cast<uint64_t>(args.step.as<int64_t>()[args.step.dim(0) == 1 ? 0 : b]);
  }
  static uint32_t row_of(const SampleArgs& args, int64_t b) {
    const int64_t row = args.rows.empty() ? b : args.rows.as<int32_t>()[b];
    return args.first_row + static_cast<uint32_t>(row);
  }

  void penalise(const SampleArgs& args, int64_t b) {
    const int64_t L = args.history.dim(1);
    const float* original = args.logits.as<float>() + b * args.logits.stride(0);
    for (int64_t i = 0; i < L; ++i) {
      const int32_t id = args.history.as<int32_t>()[b * L + i];
      if (id < 0) continue;
      const float logit = original[id];  // not x_: a token is penalised once
      x_[id] = logit > 0 ? logit / args.repeat_penalty : logit * args.repeat_penalty;
    }
  }

  void cut_after(const Candidate& last) {
    HWY_DYNAMIC_DISPATCH(cut_below)(x_, n_, last.logit);
    std::replace(x_ + last.id + 1, x_ + n_, last.logit, -kInfinity);
  }

  // The first k of the first `count` candidates, in the order of ranks, come to the front.
  Candidate select(int64_t k, int64_t count) {
    std::nth_element(candidates_, candidates_ + k - 1, candidates_ + count, ranks_before);
    return candidates_[k - 1];
  }

  // The candidates are cut back to the best k whenever a block has made them twice as many; from
  // then on only a larger logit than the least of those can matter.
  void keep_top_k(int64_t k) {
    float threshold = -kInfinity;
    int64_t count = 0;
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      count += HWY_DYNAMIC_DISPATCH(collect)(x_, begin, std::min(n_, begin + kBlock), threshold,
                                             candidates_ + count);
      if (count < 2 * k) continue;
      threshold = select(k, count).logit;
      count = k;
    }
    if (count >= k) cut_after(select(k, count));
  }

  // The cut is the first token, in the order of ranks, with which the weights so far reach top_p of
  // all. Found by bisection: the better half of the range either reaches what is left, or is taken.
  void keep_top_p(double top_p) {
    const double total = weight_of_row(1);
    double left = top_p * total;
    // Tokens below this weigh less than 1 - top_p together; half of it allows for rounding. Mostly
    // fewer tokens reach that weight, and the selection is cheaper the fewer there are.
    const double negligible = (1 - top_p) * total / static_cast<double>(n_) / 2;
    const float deepest = static_cast<float>(std::log(negligible));
    float depth = -2;
    while (depth > deepest && weight_of_row(1, max_ + depth) < left) depth *= 1.5f;
    const float threshold = max_ + std::max(depth, deepest);
    int64_t end = HWY_DYNAMIC_DISPATCH(collect)(x_, 0, n_, threshold, candidates_), begin = 0;
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      std::nth_element(candidates_ + begin, candidates_ + middle, candidates_ + end, ranks_before);
      double weight = 0;
      for (int64_t i = begin; i < middle; ++i) weight += weight_of(candidates_[i].logit, 1);
      if (weight >= left) {
        end = middle;
      } else {
        left -= weight;
        begin = middle;
      }
    }
    cut_after(candidates_[begin]);
  }

  // Relative to the largest; `rate` is one over the temperature.
  double weight_of(float logit, float rate) const {
    return std::exp(static_cast<double>(logit - max_) * static_cast<double>(rate));
  }
  double weight_of_block(int64_t begin, float rate, float threshold = -kInfinity) const {
    const int64_t size = std::min(kBlock, n_ - begin);
    return static_cast<double>(
        HWY_DYNAMIC_DISPATCH(sum_of_exp)(x_ + begin, size, max_, rate, threshold));
  }
  // Of the tokens above the threshold.
  double weight_of_row(float rate, float threshold = -kInfinity) const {
    double sum = 0;
    for (int64_t begin = 0; begin < n_; begin += kBlock)
      sum += weight_of_block(begin, rate, threshold);
    return sum;
  }

  // The token at which the weights, summed in the order of ids, pass `uniform` of their total.
  int32_t draw(double uniform, float rate) const {
    double left = uniform * weight_of_row(rate);
    int64_t last = 0;  // the last block with any weight, should rounding lead past the end
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const double weight = weight_of_block(begin, rate);
      if (left < weight) return draw_from_block(begin, left, rate);
      left -= weight;
      if (weight > 0) last = begin;
    }
    return draw_from_block(last, left, rate);
  }

  int32_t draw_from_block(int64_t begin, double left, float rate) const {
    int64_t chosen = begin;
    for (int64_t id = begin; id < std::min(n_, begin + kBlock); ++id) {
      const double weight = weight_of(x_[id], rate);
      if (weight > 0) chosen = id;
      if (left < weight) break;
      left -= weight;
    }
    return static_cast<int32_t>(chosen);
  }

  float* x_;
  int64_t n_;
  Candidate* candidates_;
  float max_ = 0;
};

}  // namespace

void sample(Context& ctx, const SampleArgs& args) {
  const int64_t B = args.logits.dim(0);
  ScratchScope scope(ctx.scratch);
  const auto logits = scope.take<float>(ctx.threads.size() * args.vocab);
  const auto candidates = scope.take<Candidate>(ctx.threads.size() * args.vocab);
  int32_t* out = args.out.as<int32_t>();
  ctx.threads.parallel_for(B, 1, [&](int64_t b, int64_t, int thread) {
    const auto n = static_cast<size_t>(args.vocab), offset = static_cast<size_t>(thread) * n;
    const auto row = logits.subspan(offset, n);
    std::copy_n(args.logits.as<float>() + b * args.logits.stride(0), n, row.begin());
    out[b] = Row(row, candidates.subspan(offset, n)).choose(args, b);
  });
  for (int64_t b = 0; b < B; ++b) {
    if (out[b] < 0) error("[sample] logits of row {} are not finite", b);
  }
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
