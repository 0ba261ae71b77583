#include "ops/adamw.h"

#include <cmath>
#include <limits>

#include "ref/adamw.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/simd.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

// Parameters of several shapes, one larger than a thread's piece of work, one not decayed.
struct Parameters {
  std::vector<Tensor> param, grad, m, v;

  explicit Parameters(Random& random, double gradient = 1) {
    const std::initializer_list<int64_t> shapes[] = {{1}, {7}, {3, 48}, {2, 3, 5}, {40000}};
    for (const auto& shape : shapes) {
      param.push_back(Tensor::normal(random, shape));
      grad.push_back(Tensor::normal(random, shape, gradient));
      m.push_back(Tensor::normal(random, shape, 0.1));
      v.push_back(Tensor::normal(random, shape, 0.1));
      for (int64_t i = 0; i < v.back().view().size(); ++i)
        v.back().set(i, std::abs(v.back().at(i)));
    }
  }
  std::vector<AdamwTensor> tensors() const {
    std::vector<AdamwTensor> out;
    for (size_t i = 0; i < param.size(); ++i)
      out.push_back({param[i], grad[i], m[i], v[i], i != 1});
    return out;
  }
  std::vector<ref::AdamwTensor<double>> reference() const {
    std::vector<ref::AdamwTensor<double>> out;
    for (size_t i = 0; i < param.size(); ++i)
      out.push_back({param[i].values(), grad[i].values(), m[i].values(), v[i].values(), i != 1});
    return out;
  }
};

AdamwArgs numbers(const View& grad_norm) {
  return {.tensors = {}, .lr = 0.01f, .step = 3, .grad_norm = grad_norm};
}

void expect_equal_to_reference(const AdamwArgs& numbers_of_update, double gradient) {
  for_each_instruction_set([&] {
    Random random(1);
    Context ctx = make_context(2);
    const Parameters parameters(random, gradient);
    auto want = parameters.reference();
    const double norm = ref::global_norm(want);
    AdamwArgs args = numbers_of_update;
    const Tensor grad_norm({1});
    const auto tensors = parameters.tensors();
    args.tensors = tensors;
    args.grad_norm = grad_norm;
    ref::adamw(args, want);
    adamw(ctx, args);
    EXPECT_NEAR(grad_norm.at(0), norm, 1e-6 * norm);
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_TRUE(near(parameters.param[i], want[i].param, {})) << i;
      EXPECT_TRUE(near(parameters.m[i], want[i].m, {})) << i;
      EXPECT_TRUE(near(parameters.v[i], want[i].v, {})) << i;
    }
  });
}

TEST(Adamw, EqualsTheReferenceWhereItClips) {
  expect_equal_to_reference(numbers({}), 1);
}

TEST(Adamw, EqualsTheReferenceWhereItDoesNotClip) {
  expect_equal_to_reference(numbers({}), 1e-3);
  AdamwArgs args = numbers({});
  args.clip = 0;
  expect_equal_to_reference(args, 10);
}

TEST(Adamw, FirstStepIsTheSignOfTheGradient) {
  Context ctx = make_context(1);
  const Tensor param = Tensor::zeros({2}), m = Tensor::zeros({2}), v = Tensor::zeros({2});
  const Tensor grad = Tensor::of({2}, std::vector<double>{-3e-3, 2}), norm({1});
  const std::vector<AdamwTensor> tensors = {{param, grad, m, v, true}};
  adamw(ctx, {.tensors = tensors, .lr = 0.5f, .clip = 0, .step = 1, .grad_norm = norm});
  EXPECT_TRUE(near(param, std::vector<double>{0.5, -0.5}, {.unit = 1e-5}));
}

TEST(Adamw, AGradientThatIsNotFiniteChangesNothing) {
  for (const double bad : {std::nan(""), -std::numeric_limits<double>::infinity()}) {
    Random random(2);
    Context ctx = make_context(2);
    Parameters parameters(random);
    const auto before = parameters.reference();
    parameters.grad[4].set(30001, bad);
    const Tensor norm({1});
    AdamwArgs args = numbers(norm);
    const auto tensors = parameters.tensors();
    args.tensors = tensors;
    adamw(ctx, args);
    EXPECT_FALSE(std::isfinite(norm.at(0)));
    for (size_t i = 0; i < before.size(); ++i) {
      EXPECT_EQ(parameters.param[i].values(), before[i].param);
      EXPECT_EQ(parameters.m[i].values(), before[i].m);
      EXPECT_EQ(parameters.v[i].values(), before[i].v);
    }
  }
}

// The gradient may well be finite then.
TEST(Adamw, ALossThatIsNotFiniteChangesNothing) {
  for (const double bad : {std::nan(""), HUGE_VAL, 3.0}) {
    Random random(2);
    Context ctx = make_context(2);
    const Parameters parameters(random);
    const auto before = parameters.reference();
    const Tensor norm({1}), loss = Tensor::of({1}, std::vector{bad}, DType::f64);
    AdamwArgs args = numbers(norm);
    const auto tensors = parameters.tensors();
    args.tensors = tensors;
    args.loss = loss;
    adamw(ctx, args);
    EXPECT_TRUE(std::isfinite(norm.at(0)));
    for (size_t i = 0; i < before.size(); ++i) {
      EXPECT_EQ(parameters.param[i].values() == before[i].param, !std::isfinite(bad));
      EXPECT_EQ(parameters.m[i].values() == before[i].m, !std::isfinite(bad));
      EXPECT_EQ(parameters.v[i].values() == before[i].v, !std::isfinite(bad));
    }
  }
}

// In memory they are the same as in the struct, whose own do not count then.
TEST(Adamw, FindsItsNumbersInMemory) {
  const auto update = [](bool in_memory) {
    Random random(7);
    Context ctx = make_context(2);
    Parameters parameters(random);
    const Tensor norm({1});
    AdamwArgs args = numbers(norm);
    const AdamwNumbers n = adamw_numbers(args);
    const std::vector<double> floats = {n.lr, n.decay, n.unbias1, n.unbias2};
    const Tensor memory = Tensor::of({4}, floats);
    if (in_memory) {
      args.numbers = memory;
      args.lr = 0.5f;
      args.step = 100;
      args.weight_decay = 0.9f;
    }
    const auto tensors = parameters.tensors();
    args.tensors = tensors;
    adamw(ctx, args);
    return parameters;
  };
  const Parameters want = update(false), got = update(true);
  for (size_t i = 0; i < want.param.size(); ++i) {
    EXPECT_TRUE(same_bits(got.param[i], want.param[i])) << i;
    EXPECT_TRUE(same_bits(got.m[i], want.m[i])) << i;
    EXPECT_TRUE(same_bits(got.v[i], want.v[i])) << i;
  }
}

TEST(Adamw, NumbersOfAStep) {
  const AdamwNumbers n = adamw_numbers({.tensors = {},
                                        .lr = 0.5f,
                                        .beta1 = 0.5f,
                                        .beta2 = 0.75f,
                                        .weight_decay = 0.25f,
                                        .step = 2,
                                        .grad_norm = {}});
  EXPECT_EQ(n.lr, 0.5f);
  EXPECT_EQ(n.decay, 0.125f);
  EXPECT_EQ(n.unbias1, 1 / 0.75f);
  EXPECT_EQ(n.unbias2, 16 / 7.0f);
}

TEST(Adamw, WritesTheRoundedParameterToo) {
  Random random(5);
  Context ctx = make_context(2);
  const Parameters parameters(random);
  const Tensor norm({1}), low3({3, 48}, DType::bf16), low40000({40000}, DType::bf16);
  auto tensors = parameters.tensors();
  tensors[2].low = low3;
  tensors[4].low = low40000;
  AdamwArgs args = numbers(norm);
  args.tensors = tensors;
  adamw(ctx, args);
  for (const auto& [i, low] : {std::pair<size_t, const Tensor&>(2, low3), {4, low40000}}) {
    std::vector<double> want = parameters.param[i].values();
    for (double& value : want)
      value = static_cast<double>(static_cast<float>(bf16(static_cast<float>(value))));
    EXPECT_EQ(low.values(), want) << i;
  }
}

// More than fit into one launch on the GPU.
TEST(Adamw, UpdatesManyTensors) {
  Random random(6);
  Context ctx = make_context(2);
  std::vector<Tensor> memory;
  std::vector<AdamwTensor> tensors;
  std::vector<ref::AdamwTensor<double>> want;
  for (int64_t i = 0; i < 150; ++i) {
    for (int part = 0; part < 3; ++part) memory.push_back(Tensor::normal(random, {i % 9 + 1}));
    memory.push_back(Tensor::zeros({i % 9 + 1}));
    const auto* const t = &memory[memory.size() - 4];
    want.push_back({t[0].values(), t[1].values(), t[2].values(), t[3].values(), true});
  }
  for (size_t i = 0; i < memory.size(); i += 4)
    tensors.push_back({memory[i], memory[i + 1], memory[i + 2], memory[i + 3], true});
  const Tensor norm({1});
  AdamwArgs args = numbers(norm);
  args.tensors = tensors;
  ref::adamw(args, want);
  adamw(ctx, args);
  for (size_t i = 0; i < want.size(); ++i)
    EXPECT_TRUE(near(memory[4 * i], want[i].param, {.unit = 2e-6})) << i;
}

TEST(Adamw, NoTensorsAreNoError) {
  Context ctx = make_context(1);
  const Tensor norm({1});
  adamw(ctx, numbers(norm));
  EXPECT_EQ(norm.at(0), 0);
}

TEST(AdamwThreads, DoNotChangeABit) {
  const auto run = [&](int threads, const Tensor& norm) {
    Random random(3);
    Context ctx = make_context(threads);
    Parameters parameters(random);
    AdamwArgs args = numbers(norm);
    const auto tensors = parameters.tensors();
    args.tensors = tensors;
    adamw(ctx, args);
    return parameters;
  };
  const Tensor norm({1}), norm_n({1});
  const Parameters one = run(1, norm);
  for (const int threads : {2, 3}) {
    const Parameters many = run(threads, norm_n);
    EXPECT_TRUE(same_bits(norm_n, norm));
    for (size_t i = 0; i < one.param.size(); ++i)
      EXPECT_TRUE(same_bits(many.param[i], one.param[i]));
  }
}

class AdamwErrors : public ::testing::Test {
 protected:
  Context ctx = make_context(1);
  Tensor norm{1}, a = Tensor::zeros({2, 3}), b = Tensor::zeros({6}), c = Tensor::zeros({2, 3}),
                  d = Tensor::zeros({2, 3}), five = Tensor::zeros({5}), gaps{{2, 3}, DType::f32, 1},
                  bf16s{{2, 3}, DType::bf16};
  std::vector<AdamwTensor> tensors{{a, b, c, d, true}};
  AdamwArgs args{.tensors = tensors, .grad_norm = norm};
  std::string message() {
    args.tensors = tensors;
    return input_error_of([&] { adamw(ctx, args); });
  }
  std::string with(float AdamwArgs::*member, float value) {
    const float before = args.*member;
    args.*member = value;
    const std::string text = message();
    args.*member = before;
    return text;
  }
};

TEST_F(AdamwErrors, NameTheNumber) {
  const float nan = std::nanf("");
  EXPECT_EQ(message(), "nothing thrown");
  for (const float bad : {-1.0f, nan}) {
    EXPECT_EQ(with(&AdamwArgs::lr, bad), "[adamw] lr must be finite and not negative");
    EXPECT_EQ(with(&AdamwArgs::beta1, bad), "[adamw] beta1 must be in [0, 1)");
    EXPECT_EQ(with(&AdamwArgs::beta2, bad), "[adamw] beta2 must be in [0, 1)");
    EXPECT_EQ(with(&AdamwArgs::eps, bad), "[adamw] eps must be finite and positive");
    EXPECT_EQ(with(&AdamwArgs::weight_decay, bad),
              "[adamw] weight_decay must be finite and not negative");
    EXPECT_EQ(with(&AdamwArgs::clip, bad),
              "[adamw] clip must be finite and not negative (0: no clipping)");
  }
  EXPECT_EQ(with(&AdamwArgs::beta1, 1), "[adamw] beta1 must be in [0, 1)");
  EXPECT_EQ(with(&AdamwArgs::eps, 0), "[adamw] eps must be finite and positive");
  args.step = 0;
  EXPECT_EQ(message(), "[adamw] step counts from 1");
  args.step = 1;
  args.numbers = five;
  EXPECT_EQ(message(), "[adamw] dim 0 of numbers: got 5, want 4");
  args.numbers = {};
  args.loss = norm;
  EXPECT_EQ(message(), "[adamw] dtype of loss: got f32, want f64");
  args.loss = {};
  args.grad_norm = {};
  EXPECT_EQ(message(), "[adamw] grad_norm is missing");
}

TEST_F(AdamwErrors, NameTheTensor) {
  tensors.push_back({a, b, c, d, true});
  tensors[1].param = {};
  EXPECT_EQ(message(), "[adamw] tensors[1].param is missing");
  tensors[1].param = a;
  tensors[1].grad = five;
  EXPECT_EQ(message(), "[adamw] dim 0 of tensors[1].grad: got 5, want 6");
  tensors[1].grad = b;
  tensors[1].m = gaps;
  EXPECT_EQ(message(), "[adamw] tensors[1].m must be contiguous");
  tensors[1].m = c;
  tensors[1].v = bf16s;
  EXPECT_EQ(message(), "[adamw] dtype of tensors[1].v: got bf16, want f32");
  tensors[1].v = d;
  tensors[1].low = a;
  EXPECT_EQ(message(), "[adamw] dtype of tensors[1].low: got f32, want bf16");
}

}  // namespace
}  // namespace mamba3::testing
