#include "core/view.h"

#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <string>
#include <vector>

#include "mamba3/error.h"

namespace mamba3 {
namespace {

struct Cube {
  std::array<float, 24> data;
  View view = view_of(data.data(), {2, 3, 4});
  Cube() { std::iota(data.begin(), data.end(), 0.0f); }
};

// The elements in row-major order of a view of rank 1 or 2.
std::vector<float> elements(const View& view) {
  std::vector<float> values;
  const View rows = view.rank == 2 ? view : view.reshape({1, view.dim(0)});
  for (int64_t i = 0; i < rows.dim(0); ++i) {
    for (int64_t j = 0; j < rows.dim(1); ++j) {
      values.push_back(rows.as<float>()[i * rows.stride(0) + j * rows.stride(1)]);
    }
  }
  return values;
}

TEST(View, KnowsItsMemory) {
  Cube cube;
  EXPECT_FALSE(cube.view.empty());
  EXPECT_EQ(cube.view.rank, 3);
  EXPECT_EQ(cube.view.size(), 24);
  EXPECT_EQ(cube.view.bytes(), 96);
  EXPECT_EQ(cube.view.stride(0), 12);
  EXPECT_EQ(cube.view.stride(1), 4);
  EXPECT_EQ(cube.view.stride(2), 1);
  EXPECT_TRUE(cube.view.contiguous());
  EXPECT_EQ(cube.view.shape(), "(2, 3, 4)");
  EXPECT_TRUE(View{}.empty());
}

TEST(View, ScalarHasOneElement) {
  float value = 3;
  const View scalar = view_of(&value, {});
  EXPECT_EQ(scalar.size(), 1);
  EXPECT_EQ(scalar.shape(), "()");
  EXPECT_TRUE(scalar.contiguous());
}

TEST(View, ElementTypeSetsTheDtype) {
  std::array<bf16, 4> halves{};
  const std::array<int32_t, 4> ids{};
  EXPECT_EQ(view_of(halves.data(), {4}).dtype, DType::bf16);
  EXPECT_EQ(view_of(halves.data(), {4}).bytes(), 8);
  EXPECT_EQ(view_of(ids.data(), {4}).dtype, DType::i32);
}

TEST(View, SliceKeepsStrides) {
  Cube cube;
  const View rows = cube.view.slice(1, 1, 3);
  EXPECT_EQ(rows.shape(), "(2, 2, 4)");
  EXPECT_EQ(rows.stride(0), 12);
  EXPECT_FALSE(rows.contiguous());
  EXPECT_EQ(elements(rows.select(0, 1)), (std::vector<float>{16, 17, 18, 19, 20, 21, 22, 23}));
  const View columns = cube.view.select(0, 0).slice(1, 2, 3);
  EXPECT_EQ(elements(columns), (std::vector<float>{2, 6, 10}));
  EXPECT_TRUE(cube.view.slice(0, 1, 2).contiguous());
  EXPECT_EQ(cube.view.slice(2, 3, 3).size(), 0);
}

TEST(View, SelectRemovesAnAxis) {
  Cube cube;
  EXPECT_EQ(cube.view.select(0, 1).shape(), "(3, 4)");
  EXPECT_EQ(elements(cube.view.select(1, 2)), (std::vector<float>{8, 9, 10, 11, 20, 21, 22, 23}));
  EXPECT_EQ(elements(cube.view.select(2, 3)), (std::vector<float>{3, 7, 11, 15, 19, 23}));
  const View last = cube.view.select(0, 1).select(0, 2).select(0, 3);
  EXPECT_EQ(last.rank, 0);
  EXPECT_EQ(*last.as<float>(), 23);
}

TEST(View, SliceOffsetsCountElementsOfTheDtype) {
  std::array<bf16, 6> data;
  for (size_t i = 0; i < data.size(); ++i) data[i] = bf16(static_cast<float>(i));
  const View row = view_of(data.data(), {2, 3}).select(0, 1);
  EXPECT_EQ(static_cast<float>(row.as<bf16>()[0]), 3.0f);
}

TEST(View, ReshapeKeepsTheElements) {
  Cube cube;
  const View flat = cube.view.reshape({6, 4});
  EXPECT_EQ(flat.data, cube.view.data);
  EXPECT_EQ(flat.shape(), "(6, 4)");
  EXPECT_EQ(flat.dtype, DType::f32);
  EXPECT_EQ(cube.view.slice(0, 1, 2).reshape({12}).as<float>()[0], 12.0f);
}

TEST(View, ReshapeRefusesOtherSizesAndGaps) {
  Cube cube;
  const auto message = [](const View& view, std::initializer_list<int64_t> dims) -> std::string {
    try {
      (void)view.reshape(dims);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message(cube.view, {5, 5}), "[reshape] cannot view (2, 3, 4) as (5, 5)");
  EXPECT_EQ(message(cube.view.slice(2, 0, 2), {12}),
            "[reshape] cannot view the strided (2, 3, 2) as (12)");
}

TEST(View, RankHasALimit) {
  float value = 0;
  EXPECT_EQ(view_of(&value, {1, 1, 1, 1, 1, 1}).rank, kMaxRank);
  EXPECT_THROW(view_of(&value, {1, 1, 1, 1, 1, 1, 1}), Error);
}

TEST(View, StridesOfDimsOfOneDoNotMatter) {
  Cube cube;
  const View column = cube.view.select(0, 0).slice(0, 1, 2);  // (1, 4), stride 4 of the first dim
  EXPECT_TRUE(column.contiguous());
  EXPECT_TRUE(cube.view.slice(1, 0, 1).slice(0, 0, 1).contiguous());
}

}  // namespace
}  // namespace mamba3
