#include "mamba3/generate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "model/checkpoint.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

// A tokenizer of 61 tokens: a byte-level BPE without merges that knows the letters a to z and a
// token that ends a text; <bos> begins one.
std::string letters_tokenizer(bool with_bos) {
  std::string vocab;
  for (int i = 0; i < 59; ++i) {
    const std::string token = i < 26 ? std::string(1, static_cast<char>('a' + i))
                                     : "u" + std::to_string(i);  // never produced by text
    vocab += (i == 0 ? "\"" : ",\"") + token + "\":" + std::to_string(i);
  }
  const std::string bos_processor =
      R"({"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<bos>","type_id":0}},)"
      R"({"Sequence":{"id":"A","type_id":0}}],"pair":[],)"
      R"("special_tokens":{"<bos>":{"id":"<bos>","ids":[60],"tokens":["<bos>"]}}})";
  return R"({"version":"1.0","added_tokens":[)"
         R"({"id":59,"content":"<|endoftext|>","single_word":false,"lstrip":false,"rstrip":false,)"
         R"("normalized":false,"special":true},)"
         R"({"id":60,"content":"<bos>","single_word":false,"lstrip":false,"rstrip":false,)"
         R"("normalized":false,"special":true}],)"
         R"("normalizer":null,"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,)"
         R"("trim_offsets":true,"use_regex":true},"post_processor":)" +
         (with_bos ? bos_processor : std::string("null")) +
         R"(,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","dropout":null,"unk_token":null,)"
         R"("continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,)"
         R"("byte_fallback":false,"vocab":{)" +
         vocab + R"(},"merges":[]}})";
}

class Generate : public ::testing::Test {
 protected:
  // With raw bytes or letters_tokenizer().
  Model load(std::string_view config, const std::string& tokenizer = "") {
    const auto folder = save_tiny_checkpoint(folder_.path(), config);
    if (!tokenizer.empty()) write_file(folder / "tokenizer.json", tokenizer);
    return Model::load(folder);
  }
  static GenerateOptions greedy(int64_t n) {
    GenerateOptions options;
    options.max_tokens = n;
    options.sampling.temperature = 0;
    return options;
  }

  TempFolder folder_;
  const std::vector<int32_t> prompt_ = {5, 6, 7, 8};
};

TEST_F(Generate, GreedyTakesTheLargestLogit) {
  const Model model = load("siso");
  Session session(model), by_hand(model);
  const Generation result = generate(session, prompt_, greedy(12));
  ASSERT_EQ(result.tokens.size(), 12u);
  EXPECT_EQ(result.finish_reason, FinishReason::length);
  EXPECT_EQ(result.prompt_tokens, 4);
  EXPECT_EQ(session.length(), 16);
  by_hand.append(prompt_);
  for (const int32_t token : result.tokens) {
    const std::span<const float> logits = by_hand.logits();
    EXPECT_EQ(token, std::max_element(logits.begin(), logits.end()) - logits.begin());
    by_hand.append({&token, 1});
  }
}

TEST_F(Generate, TheSeedDecidesTheDraws) {
  const Model model = load("mimo");
  const auto draw = [&](uint64_t seed) {
    Session session(model);
    GenerateOptions options;
    options.max_tokens = 20;
    options.sampling = {.temperature = 1.5f, .top_k = 0, .top_p = 1, .min_p = 0};
    options.sampling.seed = seed;
    return generate(session, prompt_, options).tokens;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

// All ids equally likely: every token must be a draw of its own.
TEST_F(Generate, DrawsAnewForEveryToken) {
  const Config config = tiny_config("siso");
  const NamedTensors parameters = tiny_parameters(config, 1);
  const View norm = parameters.at("backbone.norm_f.weight");
  for (int64_t i = 0; i < norm.size(); ++i) norm.as<float>()[i] = 0;
  save_checkpoint(folder_ / "flat", config, parameters);
  Session session(Model::load(folder_ / "flat"));
  GenerateOptions options;
  options.max_tokens = 40;
  options.sampling = {.temperature = 1, .top_k = 0, .top_p = 1, .min_p = 0, .seed = 3};
  const std::vector<int32_t> tokens = generate(session, prompt_, options).tokens;
  // 40 of 61 ids: 29 different ones on average.
  EXPECT_GT(std::set<int32_t>(tokens.begin(), tokens.end()).size(), 20u);
}

TEST_F(Generate, GoesOnWhereItStopped) {
  for (const TinyConfig& tiny : tiny_configs()) {
    const Model model = load(tiny.name);
    GenerateOptions options;
    options.sampling.seed = 9;
    options.sampling.repeat_penalty = 1.3f;
    options.max_tokens = 20;
    Session once(model), twice(model);
    const Generation whole = generate(once, prompt_, options);
    options.max_tokens = 8;
    Generation parts = generate(twice, prompt_, options);
    options.max_tokens = 12;
    const Generation rest = generate(twice, std::span<const int32_t>(), options);
    parts.tokens.insert(parts.tokens.end(), rest.tokens.begin(), rest.tokens.end());
    EXPECT_EQ(parts.tokens, whole.tokens) << tiny.name;
  }
}

TEST_F(Generate, RepeatPenaltyAvoidsRecentTokens) {
  Session session(load("siso"));
  GenerateOptions options = greedy(30);
  options.sampling.repeat_penalty = 1e6f;
  std::vector<int32_t> seen = generate(session, prompt_, options).tokens;
  seen.insert(seen.end(), prompt_.begin(), prompt_.end());
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end());
}

TEST_F(Generate, StreamsTheTextOfTheResult) {
  const Model model = load("siso", letters_tokenizer(false));
  Session session(model);
  std::string streamed;
  std::vector<int32_t> ids;
  const Generation result =
      generate(session, "hello", greedy(25), [&](const GeneratedToken& token) {
        streamed += token.text;
        if (token.id >= 0) ids.push_back(token.id);
        return true;
      });
  EXPECT_EQ(result.prompt_tokens, 5);
  EXPECT_EQ(streamed, result.text);
  EXPECT_EQ(ids, result.tokens);
  EXPECT_EQ(result.text, model.tokenizer().decode(result.tokens, /*skip_special=*/true));
}

TEST_F(Generate, StopTextsEndItAndAreCutOff) {
  const Model model = load("siso", letters_tokenizer(false));
  GenerateOptions options = greedy(40);
  options.stop_at_eos = false;
  Session first(model);
  const Generation whole = generate(first, "hello", options);
  ASSERT_GT(whole.text.size(), 12u);
  options.stop = {"never there", whole.text.substr(6, 4)};
  Session second(model);
  std::string streamed;
  const Generation cut = generate(second, "hello", options, [&](const GeneratedToken& token) {
    streamed += token.text;
    return true;
  });
  EXPECT_EQ(cut.finish_reason, FinishReason::stop);
  EXPECT_EQ(cut.text, whole.text.substr(0, whole.text.find(options.stop[1])));
  EXPECT_EQ(streamed, cut.text);
  EXPECT_LT(cut.tokens.size(), whole.tokens.size());
}

// The token that ends a text is made the likeliest one.
TEST_F(Generate, EndsAtTheEndOfTextToken) {
  const auto folder = folder_ / "eos";
  std::filesystem::create_directories(folder);
  const Config config = tiny_config("groups");  // with a head of its own
  const NamedTensors parameters = tiny_parameters(config, 1);
  // hidden is normed; with its weight zero but for the first channel, whose sign we choose by the
  // head's two columns, logit 59 is |h| and all others 0.
  const View norm = parameters.at("backbone.norm_f.weight"), head = parameters.at("lm_head.weight");
  for (int64_t i = 0; i < norm.size(); ++i) norm.as<float>()[i] = 0;
  for (int64_t i = 0; i < head.size(); ++i) head.as<float>()[i] = 0;
  norm.as<float>()[0] = 1;
  const auto save_with_sign = [&](float sign) {
    head.as<float>()[59 * config.D] = sign;
    save_checkpoint(folder, config, parameters);
    write_file(folder / "tokenizer.json", letters_tokenizer(false));
    return Model::load(folder);
  };
  Session probe(save_with_sign(1));
  probe.append(prompt_);
  const bool positive = probe.logits()[59] > 0;
  const Model model = save_with_sign(positive ? 1.f : -1.f);
  Session session(model), further(model);
  const Generation result = generate(session, prompt_, greedy(5));
  EXPECT_EQ(result.tokens, std::vector<int32_t>{59});
  EXPECT_EQ(result.finish_reason, FinishReason::eos);
  EXPECT_EQ(result.text, "");
  GenerateOptions options = greedy(5);
  options.stop_at_eos = false;
  EXPECT_EQ(generate(further, prompt_, options).tokens.size(), 5u);
}

TEST_F(Generate, TheCallbackCanEndIt) {
  Session session(load("siso"));
  int calls = 0;
  const Generation result =
      generate(session, prompt_, greedy(20), [&](const GeneratedToken&) { return ++calls < 3; });
  EXPECT_EQ(result.finish_reason, FinishReason::callback);
  EXPECT_EQ(result.tokens.size(), 3u);
  EXPECT_EQ(session.length(), 7);
}

TEST_F(Generate, AnEmptyPromptNeedsATokenThatBeginsATextOrEarlierTokens) {
  Session bytes(load("siso"));
  EXPECT_NE(input_error_of([&] { generate(bytes, "", greedy(3)); }).find("the prompt is empty"),
            std::string::npos);
  EXPECT_NE(input_error_of([&] {
              generate(bytes, std::span<const int32_t>(), greedy(3));
            }).find("the prompt is empty"),
            std::string::npos);
  generate(bytes, prompt_, greedy(2));
  EXPECT_EQ(generate(bytes, "", greedy(3)).tokens.size(), 3u);

  Session with_bos(load("siso", letters_tokenizer(true)));
  EXPECT_EQ(generate(with_bos, "", greedy(1)).prompt_tokens, 1);
  EXPECT_EQ(generate(with_bos, "abc", greedy(1)).prompt_tokens, 3);  // BOS only at the start
  Session again(with_bos.model());
  EXPECT_EQ(generate(again, "abc", greedy(1)).prompt_tokens, 4);
}

// The tokenizer has 256 tokens and the model's ids end at 60.
TEST_F(Generate, RefusesTokensThatTheModelDoesNotHave) {
  Session session(load("siso"));
  EXPECT_EQ(input_error_of([&] {
              generate(session,
                       "\x01"
                       "a",
                       greedy(3));
            }),
            "token id 97 at position 1 is out of range: this model knows 0 to 60");
  EXPECT_EQ(session.length(), 0);
}

TEST_F(Generate, RefusesBadOptions) {
  Session session(load("siso"));
  const auto with = [&](auto&& change) {
    GenerateOptions options;
    change(options);
    return input_error_of([&] { generate(session, prompt_, options); });
  };
  EXPECT_EQ(with([](auto& o) { o.max_tokens = -1; }),
            "the number of tokens to generate must be 0 or more, got -1");
  EXPECT_EQ(with([](auto& o) { o.sampling.temperature = -0.5f; }),
            "temperature must be 0 or more, got -0.5");
  EXPECT_EQ(with([](auto& o) { o.sampling.temperature = NAN; }),
            "temperature must be 0 or more, got nan");
  EXPECT_EQ(with([](auto& o) { o.sampling.top_k = -1; }), "top-k must be 0 (off) or more, got -1");
  EXPECT_EQ(with([](auto& o) { o.sampling.top_p = 0; }),
            "top-p must be above 0 and at most 1, got 0");
  EXPECT_EQ(with([](auto& o) { o.sampling.min_p = 1.5f; }),
            "min-p must be between 0 and 1, got 1.5");
  EXPECT_EQ(with([](auto& o) { o.sampling.repeat_penalty = 0; }),
            "the repeat penalty must be above 0, got 0");
  EXPECT_EQ(with([](auto& o) { o.sampling.repeat_window = 5000; }),
            "the repeat window must be between 0 and 4096, got 5000");
  EXPECT_EQ(with([](auto& o) { o.stop = {""}; }), "a stop text must not be empty");
  EXPECT_EQ(session.length(), 0);
}

}  // namespace
}  // namespace mamba3::testing
