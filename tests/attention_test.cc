#include "ops/attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "bench/cases.h"
#include "ref/attention.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

using bench::AttentionCase;
using testing::Complex;
using testing::input_error_of;
using testing::make_context;
using testing::near;
using testing::Random;
using testing::same_bits;
using testing::Tensor;
using testing::test_dtypes;
using testing::unit_of;

int64_t columns(const AttentionCase& c) {
  return (c.Hq + 2 * c.Hkv) * c.d;
}

// Boundaries of packed sequences of different lengths, one of them empty.
Tensor cu_seqlens_of(const AttentionCase& c) {
  const auto T = static_cast<int32_t>(c.T);
  return Tensor::of_ids({0, T / 5, T / 5, T});
}

// How activations lie in memory. A gap of 5 makes rows that no vector fits.
struct Layout {
  DType dtype = DType::f32;
  int64_t row_gap = bench::kRowGap;
};

// The bounds of y and of the gradients. In bf16 they sum products of probabilities and of gradients
// of scores that were rounded: emulated, the largest errors are 5e-3 and 5e-2. Scores themselves,
// which are always f32, lose with the number of dims that they sum.
testing::Tolerance bound_of_y(const AttentionCase& c, DType dtype) {
  return {.unit = dtype == DType::f32 ? 4e-6 : unit_of(dtype),
          .terms = std::max(1.0, static_cast<double>(c.d) / 64)};
}
testing::Tolerance bound_of_gradients(const AttentionCase& c, DType dtype) {
  return {.unit = dtype == DType::f32 ? 1e-5 : 8 * unit_of(dtype),
          .terms = std::max(1.0, static_cast<double>(c.d) / 64)};
}

// Large enough to make some probabilities close to 1.
Tensor random_qkv(Random& random, const AttentionCase& c, int64_t T, const Layout& layout = {}) {
  return Tensor::normal(random, {c.B, T, columns(c)}, 1.5, layout.dtype, layout.row_gap);
}

// A sequence as the reference sees it.
struct Reference {
  std::vector<double> y, lse;

  Reference(const AttentionCase& c, const View& qkv)  // qkv (T, columns)
      : y(static_cast<size_t>(qkv.dim(0) * c.Hq * c.d)),
        lse(static_cast<size_t>(qkv.dim(0) * c.Hq)) {
    ref::attention(c.Hq, c.Hkv, c.d, qkv.dim(0), testing::values_of(qkv).data(), y.data(),
                   lse.data());
  }
};

struct Forward {
  Tensor qkv, y, lse;
  Tensor cu_seqlens;

  Forward(Random& random, const AttentionCase& c, const Layout& layout = {})
      : qkv(random_qkv(random, c, c.T, layout)),
        y({c.B, c.T, c.Hq * c.d}, layout.dtype, layout.row_gap),
        lse({c.B, c.Hq, c.T}),
        cu_seqlens(cu_seqlens_of(c)) {}

  AttentionArgs args(const AttentionCase& c) const {
    return {.Hq = c.Hq,
            .Hkv = c.Hkv,
            .d = c.d,
            .qkv = qkv,
            .y = y,
            .lse = lse,
            .cu_seqlens = c.packed > 0 ? cu_seqlens.view() : View{},
            .cache = {}};
  }
  // The sequences as [batch, from, to).
  std::vector<std::array<int64_t, 3>> sequences(const AttentionCase& c) const {
    std::vector<std::array<int64_t, 3>> list;
    if (c.packed > 0) {
      const int32_t* cu = cu_seqlens.host().as<int32_t>();
      for (int64_t i = 0; i < 3; ++i) list.push_back({0, cu[i], cu[i + 1]});
    } else {
      for (int64_t b = 0; b < c.B; ++b) list.push_back({b, 0, c.T});
    }
    return list;
  }
};

void expect_forward(const Forward& f, const AttentionCase& c, DType dtype) {
  for (const auto& [b, from, to] : f.sequences(c)) {
    const Reference want(c, f.qkv.view().select(0, b).slice(0, from, to));
    EXPECT_TRUE(near(f.y.view().select(0, b).slice(0, from, to), want.y, bound_of_y(c, dtype)));
    EXPECT_TRUE(
        near(f.lse.view().select(0, b).slice(1, from, to), want.lse, bound_of_y(c, DType::f32)));
  }
}

void forward_agrees(const AttentionCase& base) {
  Context ctx = make_context(3);
  for (const DType dtype : test_dtypes()) {
    for (const AttentionCase& c : bench::attention_cases(base)) {
      SCOPED_TRACE(fmt::format("{}: {} {}", c.name, c.shape(), name_of(dtype)));
      Random random(21);
      const Forward f(random, c, {.dtype = dtype});
      attention(ctx, f.args(c));
      expect_forward(f, c, dtype);
    }
  }
}

TEST(Attention, ForwardOfOneBlock) {
  testing::for_each_instruction_set([] { forward_agrees({.T = 30, .Hq = 4, .Hkv = 2, .d = 20}); });
}

TEST(Attention, ForwardOfSeveralBlocks) {
  forward_agrees({.T = 200, .Hq = 4, .Hkv = 2, .d = 16});
}

// Scores far apart: nothing overflows, and the largest wins.
TEST(Attention, LargeScores) {
  Context ctx = make_context(1);
  Random random(22);
  const AttentionCase c{.T = 150, .Hq = 1, .Hkv = 1, .d = 8};
  Forward f(random, c);
  for (int64_t i = 0; i < f.qkv.host().size(); ++i) f.qkv.set(i, 30 * f.qkv.at(i));
  attention(ctx, f.args(c));
  const Reference want(c, f.qkv.view().select(0, 0));
  EXPECT_LT(testing::relative_norm(f.y, want.y), 2e-3);  // scores of thousands, f32
  EXPECT_LT(testing::relative_norm(f.lse, want.lse), 1e-6);
}

// The cache of a batch whose sequences lie in rows 2, 0 of a pool of three.
struct Cache {
  Tensor k, v, rows = Tensor::of_ids({2, 0}), lengths = Tensor::of_ids({0, 0});

  Cache(const AttentionCase& c, int64_t T_max, DType dtype = DType::f32)
      : k(Tensor::zeros({3, T_max, c.Hkv, c.d}, dtype)),
        v(Tensor::zeros({3, T_max, c.Hkv, c.d}, dtype)) {}

  AttentionCache view() const { return {k, v, rows, lengths}; }
  void advance(int64_t tokens) {
    for (int64_t b = 0; b < 2; ++b) {
      lengths.set(b, lengths.at(b) + static_cast<double>(tokens));
    }
  }
};

// Runs positions [from, to) through the cache, as one call or token by token.
void run_piece(Context& ctx, const AttentionCase& c, const Forward& f, Cache& cache, int64_t from,
               int64_t to, bool steps) {
  for (int64_t t = from; t < to; t = steps ? t + 1 : to) {
    AttentionArgs args = f.args(c);
    const int64_t end = steps ? t + 1 : to;
    args.qkv = f.qkv.view().slice(1, t, end);
    args.y = f.y.view().slice(1, t, end);
    args.lse = {};
    args.cache = cache.view();
    steps ? attention_step(ctx, args) : attention(ctx, args);
    cache.advance(end - t);
  }
}

void pieces_and_steps_are_one_call(const AttentionCase& c, DType dtype, DType cache_dtype) {
  SCOPED_TRACE(
      fmt::format("{}: {} {}, cache {}", c.name, c.shape(), name_of(dtype), name_of(cache_dtype)));
  Context ctx = make_context(2);
  // Values that the cache can hold.
  Random random(23);
  const Tensor values = random_qkv(random, c, c.T, {.dtype = cache_dtype});
  const auto make = [&] {
    Forward f(random, c, {.dtype = dtype});
    for (int64_t i = 0; i < values.host().size(); ++i) f.qkv.set(i, values.at(i));
    return f;
  };
  const Forward whole = make();
  attention(ctx, whole.args(c));
  const std::vector<double> want = whole.y.values();
  for (const int64_t split : {int64_t{1}, c.T / 3, c.T - 1}) {
    for (const bool steps : {false, true}) {
      const Forward parts = make();
      Cache cache(c, c.T + 1, cache_dtype);
      run_piece(ctx, c, parts, cache, 0, split, false);
      run_piece(ctx, c, parts, cache, split, c.T, steps);
      EXPECT_TRUE(near(parts.y, want, bound_of_y(c, dtype)))
          << "from " << split << (steps ? " by steps" : " in one piece");
      const View nobody = cache.k.view().select(0, 1);
      EXPECT_EQ(testing::values_of(nobody),
                std::vector<double>(static_cast<size_t>(nobody.size()), 0.0));
    }
  }
}

TEST(Attention, PiecesAndStepsAreOneCall) {
  auto cases = bench::attention_cases({.B = 2, .T = 40, .Hq = 4, .Hkv = 2, .d = 12});
  cases.push_back({.name = "several_blocks", .B = 2, .T = 300, .Hq = 4, .Hkv = 2, .d = 12});
  for (const int64_t d : {64, 128, 256}) {
    cases.push_back({.name = "wide", .B = 2, .T = 70, .Hq = 2, .Hkv = 1, .d = d});
  }
  cases.push_back({.name = "large_group", .B = 2, .T = 30, .Hq = 12, .Hkv = 2, .d = 16});
  for (const AttentionCase& c : cases) {
    if (c.B != 2 || c.T < 2 || c.packed > 0) continue;
    for (const DType dtype : test_dtypes()) {
      for (const DType cache : test_dtypes()) pieces_and_steps_are_one_call(c, dtype, cache);
    }
  }
}

// Sequences of a batch may have different lengths.
TEST(Attention, AStepOfUnequalSequences) {
  Context ctx = make_context(2);
  Random random(24);
  const AttentionCase c{.B = 2, .T = 1, .Hq = 4, .Hkv = 2, .d = 12};
  Cache cache(c, 400);
  const Tensor long_qkv = random_qkv(random, {.B = 1, .Hq = 4, .Hkv = 2, .d = 12}, 320);
  const Tensor short_qkv = random_qkv(random, {.B = 1, .Hq = 4, .Hkv = 2, .d = 12}, 3);
  const Tensor* sequences[] = {&long_qkv, &short_qkv};
  Tensor last({2, 1, columns(c)});
  const Tensor y({2, 1, c.Hq * c.d});
  for (int64_t b = 0; b < 2; ++b) {
    const View qkv = sequences[b]->view();
    const int64_t T = qkv.dim(1);
    const Tensor ignored({1, T - 1, c.Hq * c.d});
    AttentionCache row = cache.view();
    row.rows = row.rows.slice(0, b, b + 1);
    row.lengths = row.lengths.slice(0, b, b + 1);
    attention(ctx, {.Hq = c.Hq,
                    .Hkv = c.Hkv,
                    .d = c.d,
                    .qkv = qkv.slice(1, 0, T - 1),
                    .y = ignored,
                    .lse = {},
                    .cu_seqlens = {},
                    .cache = row});
    cache.lengths.set(b, static_cast<double>(T - 1));
    for (int64_t i = 0; i < columns(c); ++i) {
      last.set(b * columns(c) + i, sequences[b]->at((T - 1) * columns(c) + i));
    }
  }
  attention_step(ctx, {.Hq = c.Hq,
                       .Hkv = c.Hkv,
                       .d = c.d,
                       .qkv = last,
                       .y = y,
                       .lse = {},
                       .cu_seqlens = {},
                       .cache = cache.view()});
  for (int64_t b = 0; b < 2; ++b) {
    const Reference want(c, sequences[b]->view().select(0, 0));
    const std::vector<double> end(want.y.end() - c.Hq * c.d, want.y.end());
    EXPECT_TRUE(near(y.view().select(0, b).select(0, 0), end, {.unit = 4e-6})) << "sequence " << b;
  }
}

TEST(Attention, ABatchRowIsThatRowAlone) {
  Context ctx = make_context(2);
  Random random(25);
  const AttentionCase c{.B = 3, .T = 90, .Hq = 4, .Hkv = 2, .d = 16};
  const Forward f(random, c);
  attention(ctx, f.args(c));
  const Tensor y({1, c.T, c.Hq * c.d});
  AttentionArgs alone = f.args(c);
  alone.qkv = f.qkv.view().slice(0, 1, 2);
  alone.y = y;
  alone.lse = {};
  attention(ctx, alone);
  EXPECT_TRUE(near(f.y.view().slice(0, 1, 2), y.values(), {}));
}

TEST(Attention, PackedSequencesDoNotSeeEachOther) {
  Context ctx = make_context(2);
  const AttentionCase c{.T = 90, .Hq = 4, .Hkv = 2, .d = 16, .packed = 3};
  Random random(26);
  Forward f(random, c);
  attention(ctx, f.args(c));
  const Tensor before = f.y.copy();
  for (int64_t i = 0; i < c.T / 5 * columns(c); ++i) f.qkv.set(i, 9);
  attention(ctx, f.args(c));
  EXPECT_TRUE(same_bits(f.y.view().slice(1, c.T / 5, c.T), before.view().slice(1, c.T / 5, c.T)));
  EXPECT_FALSE(same_bits(f.y.view().slice(1, 0, c.T / 5), before.view().slice(1, 0, c.T / 5)));
}

// Forward and backward of random tensors with a random gradient of y.
struct Backward {
  Forward forward;
  Tensor d_y, d_qkv;

  Backward(Context& ctx, Random& random, const AttentionCase& c, const Layout& layout = {})
      : forward(random, c, layout),
        d_y(Tensor::normal(random, {c.B, c.T, c.Hq * c.d}, 1, layout.dtype, layout.row_gap)),
        d_qkv({c.B, c.T, columns(c)}, layout.dtype, layout.row_gap) {
    attention(ctx, forward.args(c));
    attention_backward(ctx, args(c));
  }
  AttentionBackwardArgs args(const AttentionCase& c) const {
    const AttentionArgs f = forward.args(c);
    return {.Hq = c.Hq,
            .Hkv = c.Hkv,
            .d = c.d,
            .qkv = f.qkv,
            .y = f.y,
            .lse = f.lse,
            .cu_seqlens = f.cu_seqlens,
            .d_y = d_y,
            .d_qkv = d_qkv};
  }
};

void expect_gradients(const Backward& run, Random& random, const AttentionCase& c, DType dtype,
                      int64_t positions) {
  for (const auto& [b, from, to] : run.forward.sequences(c)) {
    const int64_t T = to - from;
    if (T == 0) continue;
    const View qkv = run.forward.qkv.view().select(0, b).slice(0, from, to);
    const auto d_y = testing::values_of(run.d_y.view().select(0, b).slice(0, from, to));
    const auto loss = [&](const std::vector<Complex>& at) {
      std::vector<Complex> y(d_y.size()), lse(static_cast<size_t>(c.Hq * T));
      ref::attention(c.Hq, c.Hkv, c.d, T, at.data(), y.data(), lse.data());
      return testing::dot<Complex>(d_y, y);
    };
    const auto some = testing::some_positions(random, qkv.size(), positions);
    const auto want = testing::complex_step(loss, testing::values_of(qkv), some);
    const View got = run.d_qkv.view().select(0, b).slice(0, from, to);
    EXPECT_TRUE(near(testing::gather(got, some), want, bound_of_gradients(c, dtype)));
  }
}

void backward_agrees(const AttentionCase& base, int64_t positions) {
  Context ctx = make_context(3);
  for (const DType dtype : test_dtypes()) {
    for (const AttentionCase& c : bench::attention_cases(base)) {
      SCOPED_TRACE(fmt::format("{}: {} {}", c.name, c.shape(), name_of(dtype)));
      Random random(27);
      const Backward run(ctx, random, c, {.dtype = dtype});
      expect_gradients(run, random, c, dtype, positions);
    }
  }
}

TEST(Attention, BackwardOfOneBlock) {
  testing::for_each_instruction_set(
      [] { backward_agrees({.T = 13, .Hq = 4, .Hkv = 2, .d = 5}, 100); });
}

TEST(Attention, BackwardOfSeveralBlocks) {
  backward_agrees({.T = 150, .Hq = 2, .Hkv = 2, .d = 6}, 12);
}

// Widths that models have and the widest, in rows that vectors fit and in others, packed and not.
TEST(Attention, WideHeads) {
  Context ctx = make_context(2);
  for (const DType dtype : test_dtypes()) {
    for (const int64_t d : {48, 64, 128, 256}) {
      for (const int64_t row_gap : {int64_t{8}, bench::kRowGap}) {
        for (const int64_t packed : {0, 3}) {
          const AttentionCase c{.T = 70, .Hq = 2, .Hkv = 1, .d = d, .packed = packed};
          SCOPED_TRACE(fmt::format("{} {}, row gap {}", c.shape(), name_of(dtype), row_gap));
          Random random(30);
          const Backward run(ctx, random, c, {.dtype = dtype, .row_gap = row_gap});
          expect_forward(run.forward, c, dtype);
          expect_gradients(run, random, c, dtype, 30);  // enough for the scale to show
        }
      }
    }
  }
}

// The CPU knows no widest head.
TEST(Attention, TooWideForTheGpu) {
  Context ctx = make_context(1);
  const int64_t d = kWidestGpuHead + 1;
  const Tensor qkv = Tensor::zeros({1, 1, 3 * d}), y({1, 1, d});
  const std::string message = input_error_of([&] {
    attention(
        ctx,
        {.Hq = 1, .Hkv = 1, .d = d, .qkv = qkv, .y = y, .lse = {}, .cu_seqlens = {}, .cache = {}});
  });
  EXPECT_EQ(message, testing::test_device() == Device::cpu
                         ? "nothing thrown"
                         : "[attention] d is 257, and the GPU takes at most 256; use the CPU");
}

TEST(Attention, SameBitsForAnyNumberOfThreads) {
  const AttentionCase c{.B = 2, .T = 200, .Hq = 4, .Hkv = 2, .d = 16};
  Context one = make_context(1), three = make_context(3);
  Random random(28), same(28);
  const Backward first(one, random, c), second(three, same, c);
  EXPECT_TRUE(same_bits(second.forward.y, first.forward.y));
  EXPECT_TRUE(same_bits(second.forward.lse, first.forward.lse));
  EXPECT_TRUE(same_bits(second.d_qkv, first.d_qkv));
  std::vector<Tensor> steps;
  for (Context* ctx : {&one, &three}) {
    Random again(29);
    const Forward f(again, c);
    Cache cache(c, c.T);
    run_piece(*ctx, c, f, cache, 0, c.T, true);
    steps.push_back(f.y.copy());
  }
  EXPECT_TRUE(same_bits(steps[1], steps[0]));
}

struct Wrong {
  Context ctx = make_context(1);
  Tensor qkv = Tensor::zeros({2, 3, 16}), y = Tensor::zeros({2, 3, 8});
  Tensor lse = Tensor::zeros({2, 4, 3}), cu = Tensor::of_ids({0, 3});
  Cache cache{{.Hkv = 2, .d = 2}, 5}, small{{.Hkv = 2, .d = 2}, 2};
  AttentionArgs args{.Hq = 4,
                     .Hkv = 2,
                     .d = 2,
                     .qkv = qkv,
                     .y = y,
                     .lse = lse,
                     .cu_seqlens = {},
                     .cache = cache.view()};
  std::string message() {
    return input_error_of([&] { attention(ctx, args); });
  }
};

TEST(Attention, SaysWhatIsWrong) {
  EXPECT_EQ(Wrong().message(), "nothing thrown");
  const auto message = [](auto change) {
    Wrong wrong;
    change(wrong);
    return wrong.message();
  };
  EXPECT_EQ(message([](Wrong& w) { w.args.Hkv = 3; }), "[attention] Hkv must divide Hq");
  EXPECT_EQ(message([](Wrong& w) { w.args.d = 0; }), "[attention] Hq, Hkv and d must be positive");
  EXPECT_EQ(message([](Wrong& w) { w.args.d = 3; }), "[attention] dim 2 of qkv: got 16, want 24");
  EXPECT_EQ(message([](Wrong& w) { w.args.y = {}; }), "[attention] y is missing");
  EXPECT_EQ(message([](Wrong& w) { w.args.lse.dims[2] = 2; }),
            "[attention] dim 2 of lse: got 2, want 3");
  if (testing::test_device() == Device::cpu) {  // the values of a GPU's tensors are not checked
    EXPECT_EQ(message([](Wrong& w) { w.cache.lengths.set(1, 3); }),
              "[attention] cache.lengths[1] is 3, want 0 <= value < 3");
    EXPECT_EQ(message([](Wrong& w) { w.cache.rows.set(0, 3); }),
              "[attention] cache.rows[0] is 3, want 0 <= value < 3");
  }
  EXPECT_EQ(message([](Wrong& w) { w.args.cache = w.small.view(); }),
            "[attention] 3 tokens do not fit a cache of 2");
  EXPECT_EQ(message([](Wrong& w) { w.args.cu_seqlens = w.cu; }),
            "[attention] cu_seqlens needs B = 1 and at least one entry");
}

TEST(Attention, AStepSaysWhatIsWrong) {
  Wrong wrong;
  const auto message = [&](auto change) {
    AttentionArgs args = wrong.args;
    args.qkv = args.qkv.slice(1, 0, 1);
    args.y = args.y.slice(1, 0, 1);
    args.lse = {};
    change(args);
    return input_error_of([&] { attention_step(wrong.ctx, args); });
  };
  EXPECT_EQ(message([](AttentionArgs&) {}), "nothing thrown");
  EXPECT_EQ(message([](AttentionArgs& a) { a.cache = {}; }), "[attention_step] cache.k is missing");
  EXPECT_EQ(message([&](AttentionArgs& a) { a.qkv = wrong.qkv, a.y = wrong.y; }),
            "[attention_step] a step takes one token a sequence, got 3");
}

TEST(Attention, BackwardSaysWhatIsWrong) {
  Wrong wrong;
  const Tensor d_y = Tensor::zeros({2, 3, 8}), d_qkv = Tensor::zeros({2, 3, 16});
  const auto message = [&](auto change) {
    AttentionBackwardArgs args{.Hq = 4,
                               .Hkv = 2,
                               .d = 2,
                               .qkv = wrong.qkv,
                               .y = wrong.y,
                               .lse = wrong.lse,
                               .cu_seqlens = {},
                               .d_y = d_y,
                               .d_qkv = d_qkv};
    change(args);
    return input_error_of([&] { attention_backward(wrong.ctx, args); });
  };
  EXPECT_EQ(message([](AttentionBackwardArgs&) {}), "nothing thrown");
  EXPECT_EQ(message([](AttentionBackwardArgs& a) { a.lse = {}; }),
            "[attention_backward] lse is missing");
  EXPECT_EQ(message([&](AttentionBackwardArgs& a) { a.d_qkv = wrong.qkv; }),
            "[attention_backward] d_qkv and qkv must not share memory");
}

}  // namespace
}  // namespace mamba3
