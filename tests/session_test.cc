#include "mamba3/session.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "support/errors.h"
#include "support/random.h"
#include "support/temp_folder.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

class SessionTest : public ::testing::Test {
 protected:
  Model load(std::string_view config) {
    return Model::load(save_tiny_checkpoint(folder_.path(), config));
  }
  std::vector<int32_t> tokens(int64_t n) {
    std::vector<int32_t> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(static_cast<int32_t>(random_.integer(0, 61)));
    return out;
  }

  TempFolder folder_;
  Random random_{23};
};

std::vector<float> copy(std::span<const float> values) {
  return {values.begin(), values.end()};
}

double largest_difference(std::span<const float> a, std::span<const float> b) {
  double largest = a.size() == b.size() ? 0 : 1e30;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return largest;
}

TEST_F(SessionTest, ModelSaysWhatItIs) {
  const Model model = load("hybrid");
  const ModelInfo& info = model.info();
  EXPECT_EQ(info.layout, "official");
  EXPECT_EQ(info.layers, 3);
  EXPECT_EQ(info.attention_layers, std::vector<int64_t>{1});
  EXPECT_EQ(info.width, 32);
  EXPECT_EQ(info.vocab, 61);
  EXPECT_EQ(info.vocab_padded, 64);
  EXPECT_EQ(info.decay, "heavy_tail");
  EXPECT_EQ(info.weight_dtype, "f32");
  EXPECT_EQ(info.parameters, parameter_count(tiny_config("hybrid")));
  EXPECT_EQ(info.weight_bytes, 4 * info.parameters);
  EXPECT_EQ(info.state_bytes, state_bytes(tiny_config("hybrid"), 0));
  EXPECT_EQ(info.state_bytes_per_token, 4 * 2 * 2 * 8);
  EXPECT_TRUE(info.warnings.empty());
  EXPECT_EQ(model.tokenizer().vocab_size(), 256);
}

TEST_F(SessionTest, PiecesEqualTheWhole) {
  for (const TinyConfig& tiny : tiny_configs()) {
    const Model model = load(tiny.name);
    const std::vector<int32_t> ids = tokens(30);
    const std::span<const int32_t> all = ids;
    Session whole(model), pieces(model);
    whole.append(ids);
    pieces.append(all.first(11));
    pieces.append({});
    for (const int32_t id : all.subspan(11, 5)) pieces.append({&id, 1});
    pieces.append(all.subspan(16));
    EXPECT_EQ(pieces.length(), 30);
    EXPECT_LT(largest_difference(pieces.logits(), whole.logits()), 1e-3) << tiny.name;
  }
}

TEST_F(SessionTest, LogitsAreThoseOfTheLastToken) {
  const Model model = load("siso");
  const std::vector<int32_t> ids = tokens(12);
  Session all(model), some(model);
  const std::vector<float> rows = all.append_with_logits(ids);
  ASSERT_EQ(rows.size(), 12u * 61u);
  some.append(std::span(ids).first(5));
  EXPECT_LT(largest_difference(some.logits(), std::span(rows).subspan(4 * 61, 61)), 1e-3);
  EXPECT_LT(largest_difference(all.logits(), std::span(rows).subspan(11 * 61, 61)), 1e-5);
  some.append(std::span(ids).subspan(5, 1));
  EXPECT_LT(largest_difference(some.logits(), std::span(rows).subspan(5 * 61, 61)), 1e-3);
}

TEST_F(SessionTest, ResetForgetsEverything) {
  Session session(load("siso"));
  session.append(tokens(4));
  const std::vector<int32_t> ids = tokens(4);
  const std::vector<float> other = copy(session.logits());
  session.reset();
  EXPECT_EQ(session.length(), 0);
  EXPECT_EQ(input_error_of([&] { session.logits(); }),
            "there are no logits before the first token");
  session.append(ids);
  Session fresh(session.model());
  fresh.append(ids);
  EXPECT_EQ(copy(session.logits()), copy(fresh.logits()));
  EXPECT_NE(copy(session.logits()), other);
}

TEST_F(SessionTest, RefusesIdsOutOfRangeAndStaysAsItWas) {
  Session session(load("siso"));
  session.append(tokens(4));
  const std::vector<float> before = copy(session.logits());
  const std::vector<int32_t> bad = {1, 2, 99};
  EXPECT_EQ(input_error_of([&] { session.append(bad); }),
            "token id 99 at position 2 is out of range: this model knows 0 to 60");
  EXPECT_EQ(session.length(), 4);
  EXPECT_EQ(copy(session.logits()), before);
}

TEST_F(SessionTest, OneModelServesSeveralSessions) {
  const Model model = load("mimo");
  const std::vector<int32_t> a = tokens(6), b = tokens(6);
  Session first(model), second(model);
  for (size_t i = 0; i < 6; ++i) {
    first.append({&a[i], 1});
    second.append({&b[i], 1});
  }
  Session alone(model);
  for (const int32_t id : a) alone.append({&id, 1});
  EXPECT_EQ(copy(first.logits()), copy(alone.logits()));
  EXPECT_NE(copy(second.logits()), copy(alone.logits()));
}

TEST_F(SessionTest, SaysThatTheFolderIsMissing) {
  EXPECT_NE(input_error_of([&] { Model::load(folder_ / "nothing"); }).find("nothing"),
            std::string::npos);
}

}  // namespace
}  // namespace mamba3::testing
