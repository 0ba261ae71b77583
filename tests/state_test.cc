#include "model/state.h"

#include <gtest/gtest.h>

#include "support/errors.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

void fill(const StatePool& pool, int64_t row, double value) {
  for (const std::string& name : pool.tensors().names()) {
    const View view = pool.tensors().at(name).select(0, row);
    for (int64_t i = 0; i < view.size(); ++i) set_value(view, i, value);
  }
}

bool row_is(const StatePool& pool, int64_t row, double value) {
  for (const std::string& name : pool.tensors().names()) {
    for (const double x : values_of(pool.tensors().at(name).select(0, row)))
      if (x != value) return false;
  }
  return true;
}

class State : public ::testing::Test {
 protected:
  Context ctx{1};
};

TEST_F(State, BytesCountAllTensors) {
  const Config config = tiny_config("siso");  // H 4, P 16, N 16, S 4, two layers
  EXPECT_EQ(state_bytes(config, 0), 2 * 4 * (4 * 4 + 4 * 16 * 16 + 4 * 16 + 4 * 16));
  EXPECT_EQ(state_bytes(config, 1000), state_bytes(config, 0));
  const Config hybrid = tiny_config("hybrid");  // one attention layer, Hkv 2, d 8
  EXPECT_EQ(state_bytes(hybrid, 10) - state_bytes(hybrid, 0), 10 * 4 * 2 * 2 * 8);
}

TEST_F(State, RowsAreCopiedAndResetAlone) {
  const Config config = tiny_config("hybrid");
  StatePool pool(ctx, config, 3, 4);
  fill(pool, 1, 5);
  pool.set_length(1, 3);
  pool.copy(1, 2);
  EXPECT_TRUE(row_is(pool, 0, 0));
  EXPECT_TRUE(row_is(pool, 2, 5));
  EXPECT_EQ(pool.length(2), 3);
  pool.reset(1);
  EXPECT_TRUE(row_is(pool, 1, 0));
  EXPECT_TRUE(row_is(pool, 2, 5));
  EXPECT_EQ(pool.length(1), 0);
}

TEST_F(State, GrowsWithoutLosingAnything) {
  const Config config = tiny_config("hybrid");
  StatePool pool(ctx, config, 2, 4);
  fill(pool, 1, 5);
  EXPECT_FALSE(pool.reserve(4));
  EXPECT_TRUE(pool.reserve(5));
  const View cache = pool.tensors().at("layers.1.cache_k");
  EXPECT_EQ(cache.dim(1), 8);  // doubled
  for (int64_t i = 0; i < cache.size(); ++i) {
    const int64_t per_token = 2 * 8, row = i / (8 * per_token), t = i / per_token % 8;
    EXPECT_EQ(value_of(cache, i), row == 1 && t < 4 ? 5 : 0);
  }
  EXPECT_EQ(value_of(pool.tensors().at("layers.0.ssm").select(0, 1), 7), 5);
  StatePool without_attention(ctx, tiny_config("siso"), 1);
  EXPECT_FALSE(without_attention.reserve(1 << 30));
}

TEST_F(State, SelectedRowsAdvanceTogether) {
  StatePool pool(ctx, tiny_config("siso"), 4);
  pool.set_length(3, 10);
  const std::vector<int32_t> rows = {3, 1};
  StateBatch batch = pool.select(rows);
  pool.advance(batch, 5);
  EXPECT_EQ(values_of(batch.indices.at("lengths")), (std::vector<double>{15, 5}));
  EXPECT_EQ(pool.length(3), 15);
  EXPECT_EQ(pool.length(1), 5);
  EXPECT_EQ(pool.length(0), 0);
}

TEST_F(State, SequencesOfABatchAdvanceApart) {
  StatePool pool(ctx, tiny_config("hybrid"), 4);
  pool.set_length(3, 10);
  const std::vector<int32_t> rows = {3, 1, 0};
  const StateBatch batch = pool.select(rows);
  const StateBatch part = batch.slice(0, 2);
  EXPECT_EQ(part.rows, (std::vector<int32_t>{3, 1}));
  for (const BlockState& block : part.blocks) {
    EXPECT_EQ(values_of(block.mixer.rows), (std::vector<double>{3, 1}));
    EXPECT_EQ(values_of(block.attention.lengths), (std::vector<double>{10, 0}));
  }
  const std::vector<int64_t> tokens = {2, 5};
  pool.advance(part, tokens);
  pool.advance(batch.slice(2, 3), 4);
  EXPECT_EQ(values_of(batch.indices.at("lengths")), (std::vector<double>{12, 5, 4}));
  EXPECT_EQ(values_of(batch.indices.at("positions")), (std::vector<double>{12, 5, 4}));
  EXPECT_EQ(pool.length(3), 12);
  EXPECT_EQ(pool.length(1), 5);
  EXPECT_EQ(pool.length(0), 4);
  fill(pool, 3, 5);
  pool.reset();
  EXPECT_TRUE(row_is(pool, 3, 0));
  for (int64_t row = 0; row < 4; ++row) EXPECT_EQ(pool.length(row), 0);
}

TEST_F(State, RefusesRowsThatDoNotExist) {
  const StatePool pool(ctx, tiny_config("siso"), 2);
  const auto select = [&](std::vector<int32_t> rows) {
    return input_error_of([&] { pool.select(rows); });
  };
  EXPECT_EQ(select({0, 2}), "[state] row 2 is out of range: the pool has 2");
  EXPECT_EQ(select({-1}), "[state] row -1 is out of range: the pool has 2");
  EXPECT_EQ(select({1, 1}), "[state] row 1 is given twice");
}

}  // namespace
}  // namespace mamba3::testing
