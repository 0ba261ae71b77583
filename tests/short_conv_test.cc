#include "ops/short_conv.h"

#include <cmath>

#include "bench/cases.h"
#include "core/graph.h"
#include "ref/short_conv.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"

namespace mamba3::testing {
namespace {

using bench::ShortConvCase;

// Longer than the tiles of a thread of the GPU, and than the blocks whose sums the CPU adds.
constexpr int64_t kLength = 70;

std::vector<ShortConvCase> small_cases() {
  return bench::short_conv_cases({.B = 2, .T = kLength, .first = 8, .C = 20, .X = 36});
}

class ShortConv : public ::testing::TestWithParam<ShortConvCase> {};

INSTANTIATE_TEST_SUITE_P(Shapes, ShortConv, ::testing::ValuesIn(small_cases()),
                         [](const auto& row) { return row.param.name; });

struct Tensors {
  Tensor weight, bias;

  Tensors(Random& random, const ShortConvCase& c)
      : weight(Tensor::normal(random, {c.C, c.W})), bias(Tensor::normal(random, {c.C})) {}

  View bias_of(const ShortConvCase& c) const { return c.bias ? bias.view() : View{}; }
};

// A pool of states; row i of the pool serves sequence i in reverse order, so that rows matter.
struct StateTensors {
  Tensor inputs, rows;

  StateTensors(Random& random, const ShortConvCase& c, int64_t sequences)
      : inputs(Tensor::normal(random, {sequences, c.W - 1, c.C})), rows({sequences}, DType::i32) {
    for (int64_t i = 0; i < sequences; ++i) rows.set(i, static_cast<double>(sequences - 1 - i));
  }

  ShortConvState views() const { return {.inputs = inputs, .rows = rows}; }
  ShortConvState of_sequence(int64_t i) const {
    return {.inputs = inputs, .rows = rows.view().slice(0, i, i + 1)};
  }
  std::vector<double> values(int64_t i) const {
    return values_of(inputs.view().select(0, static_cast<int64_t>(rows.at(i))));
  }
};

// B sequences of any length, from these states, which are updated; none: from zero.
template <typename T>
std::vector<T> reference(const ShortConvCase& c, const std::vector<T>& in,
                         const std::vector<T>& weight, const std::vector<T>& bias,
                         std::vector<std::vector<T>>* states = nullptr) {
  const size_t X = static_cast<size_t>(c.X), C = static_cast<size_t>(c.C);
  const size_t B = static_cast<size_t>(c.B), length = in.size() / B;
  std::vector<T> out;
  for (size_t b = 0; b < B; ++b) {
    const std::vector<T> row(in.begin() + static_cast<ptrdiff_t>(b * length),
                             in.begin() + static_cast<ptrdiff_t>((b + 1) * length));
    std::vector<T> zero(static_cast<size_t>(c.W - 1) * C, T(0));
    const auto part = ref::short_conv(row, X, static_cast<size_t>(c.first), weight,
                                      c.bias ? bias : std::vector<T>{},
                                      states == nullptr ? zero : (*states)[b], C);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

// Rows without gaps and with one, which the GPU takes several columns at a time, and rows that it
// cannot.
constexpr int64_t kGaps[] = {0, 4, bench::kRowGap};

void equals_the_reference(const ShortConvCase& c, DType dtype, int64_t gap) {
  SCOPED_TRACE(fmt::format("{} {} gap {}", c.shape(), name_of(dtype), gap));
  Random random(1);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X}, 1, dtype, gap);
  const StateTensors initial(random, c, c.B);
  const auto zero = reference(c, in.values(), t.weight.values(), t.bias.values());
  std::vector<std::vector<double>> states;
  for (int64_t b = 0; b < c.B; ++b) states.push_back(initial.values(b));
  const auto continued = reference(c, in.values(), t.weight.values(), t.bias.values(), &states);
  for_each_instruction_set([&] {
    const Tensor out({c.B, c.T, c.X}, dtype, gap), out_of_state({c.B, c.T, c.X}, dtype, gap);
    ShortConvArgs args{
        .first = c.first, .in = in, .weight = t.weight, .bias = t.bias_of(c), .out = out};
    short_conv(ctx, args);
    EXPECT_TRUE(near(out, zero, rounded_to(dtype, static_cast<double>(c.W))));
    const Tensor inputs = initial.inputs.copy();
    args.out = out_of_state, args.state = {.inputs = inputs, .rows = initial.rows};
    short_conv(ctx, args);
    EXPECT_TRUE(near(out_of_state, continued, rounded_to(dtype, static_cast<double>(c.W))));
    for (int64_t b = 0; b < c.B; ++b) {
      const int64_t row = static_cast<int64_t>(initial.rows.at(b));
      EXPECT_TRUE(
          near(inputs.view().select(0, row), states[static_cast<size_t>(b)], {.unit = 1e-12}));
    }
    // Copied, not rounded again.
    EXPECT_TRUE(same_bits(out.view().slice(2, 0, c.first), in.view().slice(2, 0, c.first)));
    EXPECT_TRUE(
        same_bits(out.view().slice(2, c.first + c.C, c.X), in.view().slice(2, c.first + c.C, c.X)));
  });
}

TEST_P(ShortConv, EqualsTheReference) {
  for (const DType dtype : test_dtypes()) {
    for (const int64_t gap : kGaps) equals_the_reference(GetParam(), dtype, gap);
  }
}

void backward_is_the_gradient(const ShortConvCase& c, DType dtype, int64_t gap) {
  SCOPED_TRACE(fmt::format("{} {} gap {}", c.shape(), name_of(dtype), gap));
  Random random(2);
  Context ctx = make_context(2);
  const Tensors t(random, c), earlier(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X}, 1, dtype, gap);
  const Tensor d_out = Tensor::normal(random, {c.B, c.T, c.X}, 1, dtype, gap);
  const auto in_values = in.values(), weight = t.weight.values(), bias = t.bias.values();
  const auto d = d_out.values();
  const auto of_in = [&](const std::vector<Complex>& x) {
    return dot(d, reference(c, x, to_complex(weight), to_complex(bias)));
  };
  const auto of_weight = [&](const std::vector<Complex>& x) {
    return dot(d, reference(c, to_complex(in_values), x, to_complex(bias))) +
           dot(earlier.weight.values(), x);
  };
  const auto of_bias = [&](const std::vector<Complex>& x) {
    return dot(d, reference(c, to_complex(in_values), to_complex(weight), x)) +
           dot(earlier.bias.values(), x);
  };
  const auto positions = some_positions(random, c.B * c.T * c.X, 80);
  const auto want_in = complex_step(of_in, in_values, positions);
  const auto want_weight = complex_step(of_weight, weight);
  const auto want_bias = complex_step(of_bias, bias);
  const double tokens = static_cast<double>(c.B * c.T);
  for_each_instruction_set([&] {
    const Tensor d_in({c.B, c.T, c.X}, dtype, gap);
    const Tensor d_weight = earlier.weight.copy(), d_bias = earlier.bias.copy();
    short_conv_backward(ctx, {.first = c.first,
                              .in = in,
                              .weight = t.weight,
                              .bias = t.bias_of(c),
                              .d_out = d_out,
                              .d_in = d_in,
                              .d_weight = d_weight,
                              .d_bias = c.bias ? d_bias.view() : View{}});
    EXPECT_TRUE(near(gather(d_in, positions), want_in, rounded_to(dtype, 2. * c.W)));
    EXPECT_TRUE(near(d_weight, want_weight, {.terms = tokens}));
    EXPECT_TRUE(near(d_bias, c.bias ? want_bias : earlier.bias.values(), {.terms = tokens}));
    EXPECT_TRUE(same_bits(d_in.view().slice(2, 0, c.first), d_out.view().slice(2, 0, c.first)));
    EXPECT_TRUE(same_bits(d_in.view().slice(2, c.first + c.C, c.X),
                          d_out.view().slice(2, c.first + c.C, c.X)));
  });
}

TEST_P(ShortConv, BackwardIsTheGradient) {
  for (const DType dtype : test_dtypes()) {
    for (const int64_t gap : kGaps) backward_is_the_gradient(GetParam(), dtype, gap);
  }
}

// At the edges of the tiles of tokens and of columns, and with several blocks of them.
TEST(ShortConvSizes, EqualTheReference) {
  for (const int64_t T : {15, 16, 17, 31, 32, 33, 255, 257, 300}) {
    const ShortConvCase c{.B = 3, .T = T, .first = 4, .C = 8, .X = 16};
    for (const DType dtype : test_dtypes()) {
      equals_the_reference(c, dtype, 0);
      backward_is_the_gradient(c, dtype, 0);
    }
  }
  for (const int64_t C : {124, 128, 132, 261}) {
    const ShortConvCase c{.B = 1, .T = 20, .first = 124, .C = C, .X = 124 + C + 4};
    for (const DType dtype : test_dtypes()) {
      equals_the_reference(c, dtype, 0);
      backward_is_the_gradient(c, dtype, 0);
    }
  }
}

// A sequence cut into pieces, also of one token and of fewer than the width, with the state carried
// from each to the next.
TEST_P(ShortConv, PiecesEqualTheWhole) {
  const ShortConvCase& c = GetParam();
  Random random(3);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  for (const DType dtype : test_dtypes()) {
    const Tensor in = Tensor::normal(random, {c.B, c.T, c.X}, 1, dtype);
    const Tensor whole({c.B, c.T, c.X}, dtype), pieces({c.B, c.T, c.X}, dtype);
    Random same_a(4), same_b(4);
    const StateTensors once(same_a, c, c.B), carried(same_b, c, c.B);
    ShortConvArgs args{.first = c.first,
                       .in = in,
                       .weight = t.weight,
                       .bias = t.bias_of(c),
                       .out = whole,
                       .state = once.views()};
    short_conv(ctx, args);
    args.state = carried.views();
    for (int64_t from = 0, length = 1; from < c.T; from += length, ++length) {
      const int64_t to = std::min(c.T, from + length);
      args.in = in.view().slice(1, from, to), args.out = pieces.view().slice(1, from, to);
      short_conv(ctx, args);
    }
    EXPECT_TRUE(same_bits(pieces, whole));
    EXPECT_TRUE(same_bits(carried.inputs, once.inputs));
  }
}

// A state of zeros is what a call without one starts from.
TEST_P(ShortConv, AStateOfZerosIsTheStart) {
  const ShortConvCase& c = GetParam();
  Random random(5);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X});
  const Tensor out({c.B, c.T, c.X}), from_state({c.B, c.T, c.X});
  const Tensor inputs = Tensor::zeros({c.B, c.W - 1, c.C});
  const StateTensors rows(random, c, c.B);
  ShortConvArgs args{
      .first = c.first, .in = in, .weight = t.weight, .bias = t.bias_of(c), .out = out};
  short_conv(ctx, args);
  args.out = from_state, args.state = {.inputs = inputs, .rows = rows.rows};
  short_conv(ctx, args);
  EXPECT_TRUE(near(from_state, out.values(), {.unit = 1e-7}));
}

// Sequences of length 0, 1, 2 and more, that begin within tiles and at their edges.
const std::vector<int32_t> kCuts = {0, 0, 1, 3, 3, 3, 16, 21, 32, 34, 65, 70, 70};

TEST_P(ShortConv, PackedSequencesEqualSeparateOnes) {
  ShortConvCase c = GetParam();
  c.B = 1, c.T = kLength;
  Random random(6);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  const Tensor cu = Tensor::of_ids({0, 0, 1, 3, 3, 3, 16, 21, 32, 34, 65, 70, 70});
  const int64_t sequences = static_cast<int64_t>(kCuts.size()) - 1;
  for (const DType dtype : test_dtypes()) {
    const Tensor in = Tensor::normal(random, {1, c.T, c.X}, 1, dtype);
    const Tensor d_out = Tensor::normal(random, {1, c.T, c.X}, 1, dtype);
    for (const bool with_state : {false, true}) {
      const Tensor out({1, c.T, c.X}, dtype), separate({1, c.T, c.X}, dtype);
      Random same_a(7), same_b(7);
      const StateTensors packed(same_a, c, sequences), alone(same_b, c, sequences);
      ShortConvArgs args{.first = c.first,
                         .in = in,
                         .weight = t.weight,
                         .bias = t.bias_of(c),
                         .out = out,
                         .cu_seqlens = cu,
                         .state = with_state ? packed.views() : ShortConvState{}};
      short_conv(ctx, args);
      args.cu_seqlens = {};
      for (int64_t i = 0; i < sequences; ++i) {
        const int64_t from = kCuts[static_cast<size_t>(i)], to = kCuts[static_cast<size_t>(i + 1)];
        args.in = in.view().slice(1, from, to), args.out = separate.view().slice(1, from, to);
        if (with_state) args.state = alone.of_sequence(i);
        short_conv(ctx, args);
      }
      EXPECT_TRUE(same_bits(out, separate));
      EXPECT_TRUE(same_bits(packed.inputs, alone.inputs));
    }

    const Tensor d_in({1, c.T, c.X}, dtype), d_separate({1, c.T, c.X}, dtype);
    const Tensor d_weight = Tensor::zeros({c.C, c.W}), d_weights = Tensor::zeros({c.C, c.W});
    const Tensor d_bias = Tensor::zeros({c.C}), d_biases = Tensor::zeros({c.C});
    ShortConvBackwardArgs args{.first = c.first,
                               .in = in,
                               .weight = t.weight,
                               .bias = t.bias_of(c),
                               .d_out = d_out,
                               .d_in = d_in,
                               .d_weight = d_weight,
                               .d_bias = c.bias ? d_bias.view() : View{},
                               .cu_seqlens = cu};
    short_conv_backward(ctx, args);
    args.cu_seqlens = {}, args.d_weight = d_weights;
    args.d_bias = c.bias ? d_biases.view() : View{};
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t from = kCuts[static_cast<size_t>(i)], to = kCuts[static_cast<size_t>(i + 1)];
      args.in = in.view().slice(1, from, to), args.d_out = d_out.view().slice(1, from, to);
      args.d_in = d_separate.view().slice(1, from, to);
      short_conv_backward(ctx, args);
    }
    EXPECT_TRUE(same_bits(d_in, d_separate));
    EXPECT_TRUE(near(d_weight, d_weights.values(), {.terms = kLength}));
    EXPECT_TRUE(near(d_bias, d_biases.values(), {.terms = kLength}));
  }
}

TEST(ShortConvThreads, DoNotChangeABit) {
  const ShortConvCase c{.B = 3, .T = 200, .first = 5, .C = 301, .X = 310};
  Random random(8);
  const Tensors t(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X});
  const Tensor d_out = Tensor::normal(random, {c.B, c.T, c.X});
  struct Results {
    Tensor out, d_in, d_weight, d_bias;
  };
  const auto run = [&](int threads, int64_t first_row) {
    Context ctx = make_context(threads);
    const int64_t rows = c.B - first_row;
    Results r{Tensor({rows, c.T, c.X}), Tensor({rows, c.T, c.X}), Tensor::zeros({c.C, c.W}),
              Tensor::zeros({c.C})};
    const View some = in.view().slice(0, first_row, c.B);
    short_conv(ctx,
               {.first = c.first, .in = some, .weight = t.weight, .bias = t.bias, .out = r.out});
    short_conv_backward(ctx, {.first = c.first,
                              .in = some,
                              .weight = t.weight,
                              .bias = t.bias,
                              .d_out = d_out.view().slice(0, first_row, c.B),
                              .d_in = r.d_in,
                              .d_weight = r.d_weight,
                              .d_bias = r.d_bias});
    return r;
  };
  const Results one = run(1, 0);
  for (const int threads : {2, 3}) {
    const Results many = run(threads, 0);
    EXPECT_TRUE(same_bits(many.out, one.out));
    EXPECT_TRUE(same_bits(many.d_in, one.d_in));
    EXPECT_TRUE(same_bits(many.d_weight, one.d_weight));
    EXPECT_TRUE(same_bits(many.d_bias, one.d_bias));
  }
  // A row of the batch is that row alone.
  const Results last = run(2, c.B - 1);
  EXPECT_TRUE(same_bits(last.out, one.out.view().slice(0, c.B - 1, c.B)));
  EXPECT_TRUE(same_bits(last.d_in, one.d_in.view().slice(0, c.B - 1, c.B)));
}

// A NaN reaches what reads it, and nothing else: neither other channels nor the next sequence.
TEST(ShortConvNaN, StaysWhereItIsRead) {
  constexpr int64_t T = 12, X = 8, C = 4, W = 4;
  Random random(9);
  Context ctx = make_context(1);
  const Tensor weight = Tensor::normal(random, {C, W});
  const Tensor cu = Tensor::of_ids({0, 9, 12});
  const auto nans = [&](const Tensor& tensor) {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < T * X; ++i) {
      if (std::isnan(tensor.at(i))) found.push_back(i);
    }
    return found;
  };
  Tensor in = Tensor::normal(random, {1, T, X});
  in.set(3 * X + 4, std::nan(""));  // a channel
  in.set(8 * X + 5, std::nan(""));  // at the end of its sequence
  in.set(5 * X + 0, std::nan(""));  // copied
  const Tensor out({1, T, X});
  short_conv(ctx, {.first = 4, .in = in, .weight = weight, .out = out, .cu_seqlens = cu});
  EXPECT_EQ(nans(out),
            (std::vector<int64_t>{3 * X + 4, 4 * X + 4, 5 * X, 5 * X + 4, 6 * X + 4, 8 * X + 5}));

  const Tensor clean = Tensor::normal(random, {1, T, X});
  Tensor d_out = Tensor::normal(random, {1, T, X});
  d_out.set(9 * X + 4, std::nan(""));  // at the start of its sequence
  d_out.set(6 * X + 5, std::nan(""));
  d_out.set(2 * X + 1, std::nan(""));  // copied
  const Tensor d_in({1, T, X}), d_weight = Tensor::zeros({C, W});
  short_conv_backward(ctx, {.first = 4,
                            .in = clean,
                            .weight = weight,
                            .d_out = d_out,
                            .d_in = d_in,
                            .d_weight = d_weight,
                            .cu_seqlens = cu});
  EXPECT_EQ(nans(d_in), (std::vector<int64_t>{2 * X + 1, 3 * X + 5, 4 * X + 5, 5 * X + 5, 6 * X + 5,
                                              9 * X + 4}));
}

TEST(ShortConvEmpty, NoTokensKeepTheState) {
  const ShortConvCase c{.B = 1, .T = 0, .first = 0, .C = 4, .X = 4};
  Random random(10);
  Context ctx = make_context(1);
  const Tensors t(random, c);
  const StateTensors state(random, c, 1);
  const Tensor before = state.inputs.copy(), in({1, 0, 4}), out({1, 0, 4}), d_in({1, 0, 4});
  const Tensor d_weight = t.weight.copy(), cu = Tensor::of_ids({0, 0});
  for (const View& packed : {View{}, cu.view()}) {
    short_conv(
        ctx,
        {.in = in, .weight = t.weight, .out = out, .cu_seqlens = packed, .state = state.views()});
    EXPECT_TRUE(same_bits(state.inputs, before));
    short_conv_backward(ctx, {.in = in,
                              .weight = t.weight,
                              .d_out = out,
                              .d_in = d_in,
                              .d_weight = d_weight,
                              .cu_seqlens = packed});
    EXPECT_TRUE(same_bits(d_weight, t.weight));
  }
}

// A step of decoding, recorded and replayed.
TEST(ShortConvStep, InAGraphEqualsTheSequence) {
  const ShortConvCase c{.B = 3, .T = 5, .first = 8, .C = 20, .X = 36};
  Random random(11);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X}), out({c.B, c.T, c.X});
  Random same_a(12), same_b(12);
  const StateTensors once(same_a, c, c.B), stepped(same_b, c, c.B);
  short_conv(ctx, {.first = c.first,
                   .in = in,
                   .weight = t.weight,
                   .bias = t.bias,
                   .out = out,
                   .state = once.views()});
  const Tensor token({c.B, 1, c.X}), result({c.B, 1, c.X});
  Graph graph;
  for (int64_t i = 0; i < c.T; ++i) {
    for (int64_t b = 0; b < c.B; ++b) {
      copy(ctx, in.view().select(0, b).slice(0, i, i + 1), token.view().select(0, b));
    }
    graph.run(ctx, [&] {
      short_conv(ctx, {.first = c.first,
                       .in = token,
                       .weight = t.weight,
                       .bias = t.bias,
                       .out = result,
                       .state = stepped.views()});
    });
    EXPECT_TRUE(same_bits(result, out.view().slice(1, i, i + 1)));
  }
  EXPECT_TRUE(same_bits(stepped.inputs, once.inputs));
}

TEST(ShortConvSteadyState, ASecondCallAllocatesNothing) {
  const ShortConvCase c{.B = 2, .T = 100, .first = 8, .C = 20, .X = 36};
  Random random(13);
  Context ctx = make_context(2);
  const Tensors t(random, c);
  const Tensor in = Tensor::normal(random, {c.B, c.T, c.X}), out({c.B, c.T, c.X}),
               d_in({c.B, c.T, c.X}), d_weight = t.weight.copy(), d_bias = t.bias.copy();
  const auto run = [&] {
    short_conv(ctx, {.first = c.first, .in = in, .weight = t.weight, .bias = t.bias, .out = out});
    short_conv_backward(ctx, {.first = c.first,
                              .in = in,
                              .weight = t.weight,
                              .bias = t.bias,
                              .d_out = out,
                              .d_in = d_in,
                              .d_weight = d_weight,
                              .d_bias = d_bias});
  };
  run();
  const int64_t before = ctx.scratch.allocations();
  run();
  EXPECT_EQ(ctx.scratch.allocations(), before);
}

TEST(ShortConvErrors, NameTheArgument) {
  Context ctx = make_context(1);
  const Tensor in = Tensor::zeros({2, 3, 10}), out({2, 3, 10}), other({2, 3, 9});
  const Tensor weight = Tensor::zeros({4, 4}), bias = Tensor::zeros({4});
  const Tensor wide = Tensor::zeros({4, 9}), narrow = Tensor::zeros({4, 1});
  const Tensor inputs = Tensor::zeros({2, 3, 4}), rows = Tensor::of_ids({0, 1});
  const ShortConvArgs good{
      .first = 6, .in = in, .weight = weight, .bias = bias, .out = out, .cu_seqlens = {}};
  const auto forward = [&](auto change) {
    ShortConvArgs args = good;
    change(args);
    return input_error_of([&] { short_conv(ctx, args); });
  };
  EXPECT_EQ(forward([](auto&) {}), "nothing thrown");
  EXPECT_EQ(forward([](auto& a) { a.in = {}; }), "[short_conv] in is missing");
  EXPECT_EQ(forward([](auto& a) { a.weight = {}; }), "[short_conv] weight is missing");
  EXPECT_EQ(forward([](auto& a) { a.out = {}; }), "[short_conv] out is missing");
  EXPECT_EQ(forward([&](auto& a) { a.weight = wide; }), "[short_conv] the width is 9, want 2 to 8");
  EXPECT_EQ(forward([&](auto& a) { a.weight = narrow; }),
            "[short_conv] the width is 1, want 2 to 8");
  EXPECT_EQ(forward([&](auto& a) { a.weight = weight.view().slice(0, 0, 0); }),
            "[short_conv] weight has no channels");
  EXPECT_EQ(forward([](auto& a) { a.first = 7; }),
            "[short_conv] channels 7 to 11 do not lie in 10 columns");
  EXPECT_EQ(forward([](auto& a) { a.first = -1; }),
            "[short_conv] channels -1 to 3 do not lie in 10 columns");
  EXPECT_EQ(forward([&](auto& a) { a.bias = rows; }),
            "[short_conv] dtype of bias: got i32, want f32");
  EXPECT_EQ(forward([&](auto& a) { a.out = other; }), "[short_conv] dim 2 of out: got 9, want 10");
  EXPECT_EQ(forward([&](auto& a) { a.out = in; }), "[short_conv] out and in must not share memory");
  EXPECT_EQ(forward([&](auto& a) { a.cu_seqlens = rows; }),
            "[short_conv] cu_seqlens needs B = 1 and at least one entry");
  EXPECT_EQ(forward([&](auto& a) { a.state = {.inputs = in, .rows = rows}; }),
            "[short_conv] dim 2 of state.inputs: got 10, want 4");
  EXPECT_EQ(forward([&](auto& a) { a.state = {.inputs = inputs, .rows = {}}; }),
            "[short_conv] state.rows is missing");
  EXPECT_EQ(
      forward([&](auto& a) { a.state = {.inputs = inputs, .rows = rows.view().slice(0, 0, 1)}; }),
      "[short_conv] dim 0 of state.rows: got 1, want 2");
  if (test_device() == Device::cpu) {
    const Tensor outside = Tensor::of_ids({0, 2});
    EXPECT_EQ(forward([&](auto& a) { a.state = {.inputs = inputs, .rows = outside}; }),
              "[short_conv] state.rows[1] is 2, want 0 <= value < 2");
  }

  const Tensor d_in({2, 3, 10}), d_weight = Tensor::zeros({4, 4}), d_bias = Tensor::zeros({4});
  const ShortConvBackwardArgs good_backward{.first = 6,
                                            .in = in,
                                            .weight = weight,
                                            .bias = bias,
                                            .d_out = out,
                                            .d_in = d_in,
                                            .d_weight = d_weight,
                                            .d_bias = d_bias};
  const auto backward = [&](auto change) {
    ShortConvBackwardArgs args = good_backward;
    change(args);
    return input_error_of([&] { short_conv_backward(ctx, args); });
  };
  EXPECT_EQ(backward([](auto&) {}), "nothing thrown");
  EXPECT_EQ(backward([](auto& a) { a.weight = {}; }), "[short_conv_backward] weight is missing");
  EXPECT_EQ(backward([&](auto& a) { a.d_out = other; }),
            "[short_conv_backward] dim 2 of d_out: got 9, want 10");
  EXPECT_EQ(backward([](auto& a) { a.d_in = {}; }), "[short_conv_backward] d_in is missing");
  EXPECT_EQ(backward([&](auto& a) { a.d_in = in; }),
            "[short_conv_backward] d_in and in must not share memory");
  EXPECT_EQ(backward([&](auto& a) { a.d_in = out; }),
            "[short_conv_backward] d_in and d_out must not share memory");
  EXPECT_EQ(backward([&](auto& a) { a.d_weight = wide; }),
            "[short_conv_backward] dim 1 of d_weight: got 9, want 4");
  EXPECT_EQ(backward([&](auto& a) { a.d_weight = weight; }),
            "[short_conv_backward] d_weight and weight must not share memory");
  EXPECT_EQ(backward([](auto& a) { a.d_bias = {}; }),
            "[short_conv_backward] d_bias goes with a bias: both, or none");
  EXPECT_EQ(backward([](auto& a) { a.bias = {}; }),
            "[short_conv_backward] d_bias goes with a bias: both, or none");
  EXPECT_EQ(backward([&](auto& a) { a.d_bias = bias; }),
            "[short_conv_backward] d_bias and bias must not share memory");
  EXPECT_EQ(backward([&](auto& a) { a.d_bias = weight; }),
            "[short_conv_backward] rank of d_bias: got 2, want 1");
}

}  // namespace
}  // namespace mamba3::testing
