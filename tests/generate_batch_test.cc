#include <gtest/gtest.h>

#include <algorithm>

#include "infer/engine.h"
#include "mamba3/generate.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

using Prompts = std::vector<std::vector<int32_t>>;

class GenerateBatch : public ::testing::Test {
 protected:
  Model load(std::string_view config) {
    return Model::load(save_tiny_checkpoint(folder_.path(), config),
                       {.device = std::string(name_of(test_device())), .dtype = "f32"});
  }
  static BatchOptions greedy(int64_t n) {
    BatchOptions options;
    options.generate.max_tokens = n;
    options.generate.sampling.temperature = 0;
    return options;
  }

  TempFolder folder_;
  // Of different lengths, one of them twice.
  const Prompts prompts_ = {
      {5, 6, 7, 8}, {1}, {60, 2, 2, 9, 17, 3, 40, 41, 12}, {5, 6, 7, 8}, {30}};
};

void expect_equal(const Generation& a, const Generation& b, const std::string& what) {
  EXPECT_EQ(a.tokens, b.tokens) << what;
  EXPECT_EQ(a.text, b.text) << what;
  EXPECT_EQ(a.finish_reason, b.finish_reason) << what;
  EXPECT_EQ(a.prompt_tokens, b.prompt_tokens) << what;
}

// Greedily, so that rows have no draws of their own.
TEST_F(GenerateBatch, EachRowEqualsThatSequenceAlone) {
  for (const TinyConfig& tiny : tiny_configs()) {
    const Model model = load(tiny.name);
    for (const float penalty : {1.0f, 1.5f}) {
      BatchOptions options = greedy(20);
      options.generate.sampling.repeat_penalty = penalty;
      options.generate.sampling.repeat_window = 6;
      const std::vector<Generation> batch = generate_batch(model, prompts_, options);
      ASSERT_EQ(batch.size(), prompts_.size());
      for (size_t i = 0; i < prompts_.size(); ++i) {
        Session session(model);
        expect_equal(batch[i], generate(session, prompts_[i], options.generate),
                     tiny.name + " prompt " + std::to_string(i));
      }
    }
  }
}

// And they are the same however many run at once.
TEST_F(GenerateBatch, EachPromptHasDrawsOfItsOwn) {
  const Model model = load("hybrid");
  BatchOptions options;
  options.generate.max_tokens = 20;
  options.generate.sampling = {.temperature = 1.5f, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 3};
  const std::vector<Generation> all = generate_batch(model, prompts_, options);
  EXPECT_NE(all[0].tokens, all[3].tokens);  // one prompt
  Session session(model);
  expect_equal(all[0], generate(session, prompts_[0], options.generate), "the first");
  for (const int64_t parallel : {1, 2}) {
    options.parallel = parallel;
    const std::vector<Generation> some = generate_batch(model, prompts_, options);
    for (size_t i = 0; i < all.size(); ++i) expect_equal(some[i], all[i], std::to_string(i));
  }
  // Nor does it matter who has left.
  options.parallel = 64;
  options.generate.stop = {all[0].text.substr(3, 2)};
  const std::vector<Generation> cut = generate_batch(model, prompts_, options);
  EXPECT_LT(cut[0].tokens.size(), 8u);
  for (size_t i = 0; i < all.size(); ++i) {
    const std::vector<int32_t>& want = all[i].tokens;
    ASSERT_LE(cut[i].tokens.size(), want.size());
    EXPECT_TRUE(std::equal(cut[i].tokens.begin(), cut[i].tokens.end(), want.begin())) << i;
  }
}

// A text that one sequence writes early, and others late or never, ends them one after the other.
TEST_F(GenerateBatch, SequencesLeaveWhenTheyEnd) {
  const Model model = load("hybrid");
  BatchOptions options = greedy(30);
  const std::vector<Generation> whole = generate_batch(model, prompts_, options);
  options.generate.stop = {whole[0].text.substr(3, 2), whole[2].text.substr(12, 3)};
  std::vector<int64_t> order;
  std::vector<int64_t> lengths;
  const std::vector<Generation> cut =
      generate_batch(model, prompts_, options, [&](int64_t index, const Generation& g) {
        order.push_back(index);
        lengths.push_back(std::ssize(g.tokens));
      });
  EXPECT_EQ(cut[0].finish_reason, FinishReason::stop);
  EXPECT_LT(cut[0].tokens.size(), 8u);
  for (size_t i = 0; i < prompts_.size(); ++i) {
    Session session(model);
    expect_equal(cut[i], generate(session, prompts_[i], options.generate), std::to_string(i));
  }
  EXPECT_TRUE(std::is_sorted(lengths.begin(), lengths.end()));
  EXPECT_LT(lengths.front(), lengths.back());
  std::sort(order.begin(), order.end());
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3, 4}));
}

TEST_F(GenerateBatch, TakesTextsAndNothing) {
  const Model model = load("siso");
  const std::vector<std::string> texts = {"\x05\x06\x07\x08", "\x01"};
  const std::vector<Generation> batch = generate_batch(model, texts, greedy(9));
  const std::vector<Generation> same =
      generate_batch(model, Prompts{prompts_[0], prompts_[1]}, greedy(9));
  for (size_t i = 0; i < 2; ++i) expect_equal(batch[i], same[i], std::to_string(i));
  EXPECT_TRUE(generate_batch(model, Prompts{}, greedy(9)).empty());
  int ended = 0;
  for (const Generation& g :
       generate_batch(model, prompts_, greedy(0), [&](int64_t, const Generation&) { ++ended; })) {
    EXPECT_TRUE(g.tokens.empty());
  }
  EXPECT_EQ(ended, 5);
}

// They are read together: each has its share of the time.
TEST_F(GenerateBatch, SharesTheTimeOfThePromptsByTokens) {
  const Model model = load("siso");
  const std::vector<Generation> all = generate_batch(model, prompts_, greedy(1));
  const auto per_token = [](const Generation& g) {
    return g.prompt_seconds / static_cast<double>(g.prompt_tokens);
  };
  EXPECT_GT(per_token(all[0]), 0);
  for (const Generation& g : all) EXPECT_DOUBLE_EQ(per_token(g), per_token(all[0]));
}

TEST_F(GenerateBatch, NamesABadPrompt) {
  const Model model = load("siso");
  EXPECT_EQ(input_error_of([&] {
              generate_batch(model, Prompts{{1}, {}});
            }),
            "prompt 1 is empty: give at least one token");
  EXPECT_EQ(input_error_of([&] {
              generate_batch(model, Prompts{{1}, {2, 61}});
            }),
            "prompt 1: token id 61 at position 1 is out of range: this model knows 0 to 60");
  EXPECT_EQ(input_error_of([&] { generate_batch(model, prompts_, {.parallel = 0}); }),
            "sequences that run at once must be 1 or more, got 0");
}

TEST_F(GenerateBatch, EngineRefusesRowsThatCannotBe) {
  const LanguageModel model = tiny_model(tiny_config("siso"), 3);
  Engine engine(model, 3);
  const std::vector<int32_t> outside = {0, 3}, twice = {1, 1}, some = {1, 2};
  EXPECT_EQ(input_error_of([&] { engine.select(outside); }),
            "[state] row 3 is out of range: the pool has 3");
  EXPECT_EQ(input_error_of([&] { engine.select(twice); }), "[state] row 1 is given twice");
  engine.select(some);
  EXPECT_EQ(engine.sequences(), 2);
  EXPECT_EQ(input_error_of([&] { engine.fork(0, 2); }),
            "row 2 is selected: it cannot become a copy");
}

}  // namespace
}  // namespace mamba3::testing
