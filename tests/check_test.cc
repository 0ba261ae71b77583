#include "core/check.h"

#include <gtest/gtest.h>

#include <array>
#include <string>

#include "mamba3/error.h"

namespace mamba3 {
namespace {

class CheckTest : public ::testing::Test {
 protected:
  // The message of the InputError that `call` throws, or "" if it throws nothing.
  template <typename Call>
  static std::string message(Call&& call) {
    try {
      call();
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  }

  Context context_{1};
  Check check_{"rms_norm", context_};
  std::array<float, 64> floats_{};
  std::array<int32_t, 4> ids_{3, 0, 9, -1};
  View matrix_ = view_of(floats_.data(), {4, 8});
};

TEST_F(CheckTest, FittingTensorPasses) {
  EXPECT_EQ(message([&] { check_.tensor("x", matrix_, {4, 8}); }), "");
  EXPECT_EQ(message([&] { check_.dense("x", matrix_, {4, 8}, {DType::bf16, DType::f32}); }), "");
  EXPECT_EQ(message([&] { check_.tensor("x", matrix_.slice(1, 2, 4), {4, 2}); }), "");
}

TEST_F(CheckTest, MissingTensor) {
  EXPECT_EQ(message([&] {
              check_.tensor("weight", View{}, {4, 8});
            }),
            "[rms_norm] weight is missing");
}

TEST_F(CheckTest, OtherDevice) {
  View view = matrix_;
  view.device = Device::cuda;
  EXPECT_EQ(message([&] {
              check_.tensor("weight", view, {4, 8});
            }),
            "[rms_norm] weight is on the GPU, want the CPU");
}

TEST_F(CheckTest, OtherDtype) {
  EXPECT_EQ(message([&] { check_.tensor("x", view_of(ids_.data(), {4}), {4}); }),
            "[rms_norm] dtype of x: got i32, want f32");
  EXPECT_EQ(
      message([&] {
        check_.tensor("x", view_of(ids_.data(), {4}), {4}, {DType::f32, DType::bf16, DType::f16});
      }),
      "[rms_norm] dtype of x: got i32, want f32 or bf16 or f16");
}

TEST_F(CheckTest, OtherRank) {
  EXPECT_EQ(message([&] { check_.tensor("x", matrix_, {32}); }),
            "[rms_norm] rank of x: got 2, want 1");
}

TEST_F(CheckTest, OtherDims) {
  EXPECT_EQ(message([&] {
              check_.tensor("x", matrix_, {5, 8});
            }),
            "[rms_norm] dim 0 of x: got 4, want 5");
  EXPECT_EQ(message([&] {
              check_.tensor("x", matrix_, {4, 7});
            }),
            "[rms_norm] dim 1 of x: got 8, want 7");
}

TEST_F(CheckTest, StridedRows) {
  EXPECT_EQ(message([&] { check_.tensor("x", matrix_.select(1, 3), {4}); }),
            "[rms_norm] innermost stride of x: got 8, want 1");
  EXPECT_EQ(message([&] { check_.tensor("x", matrix_.slice(1, 3, 4), {4, 1}); }), "");
}

TEST_F(CheckTest, GapsBetweenRows) {
  EXPECT_EQ(message([&] {
              check_.dense("x", matrix_.slice(1, 2, 4), {4, 2});
            }),
            "[rms_norm] x must be contiguous");
}

TEST_F(CheckTest, SharedMemory) {
  const View first = matrix_.slice(0, 0, 2), second = matrix_.slice(0, 2, 4);
  EXPECT_EQ(message([&] { check_.disjoint("x", first, "out", second); }), "");
  EXPECT_EQ(message([&] { check_.disjoint("x", first, "out", first); }),
            "[rms_norm] x and out must not share memory");
  EXPECT_EQ(message([&] { check_.disjoint("x", matrix_, "out", second); }),
            "[rms_norm] x and out must not share memory");
  EXPECT_EQ(message([&] { check_.disjoint("x", second, "out", matrix_.slice(0, 1, 3)); }),
            "[rms_norm] x and out must not share memory");
  EXPECT_EQ(message([&] { check_.disjoint("x", View{}, "out", first); }), "");
  EXPECT_EQ(message([&] { check_.disjoint("x", matrix_.slice(0, 1, 1), "out", matrix_); }), "");
}

TEST_F(CheckTest, SharedMemoryUnlessTheSameView) {
  const View first = matrix_.slice(0, 0, 2);
  EXPECT_EQ(message([&] { check_.same_or_disjoint("x", first, "out", first); }), "");
  EXPECT_EQ(message([&] { check_.same_or_disjoint("x", first, "out", matrix_.slice(0, 2, 4)); }),
            "");
  EXPECT_EQ(message([&] { check_.same_or_disjoint("x", first, "out", matrix_); }),
            "[rms_norm] x and out must not share memory");
}

TEST_F(CheckTest, Condition) {
  EXPECT_EQ(message([&] { check_.that(true, "H must divide"); }), "");
  EXPECT_EQ(message([&] { check_.that(false, "H must divide"); }), "[rms_norm] H must divide");
}

TEST_F(CheckTest, Range) {
  const View ids = view_of(ids_.data(), {4});
  EXPECT_EQ(message([&] { check_.range("ids", ids, -1, 10); }), "");
  EXPECT_EQ(message([&] { check_.range("ids", ids, -1, 9); }),
            "[rms_norm] ids[2] is 9, want -1 <= value < 9");
  EXPECT_EQ(message([&] { check_.range("ids", ids, 0, 10); }),
            "[rms_norm] ids[3] is -1, want 0 <= value < 10");
}

}  // namespace
}  // namespace mamba3
