#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "infer/engine.h"
#include "mamba3/generate.h"
#include "support/compare.h"
#include "support/files.h"
#include "support/golden.h"
#include "support/program.h"
#include "support/temp_folder.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

constexpr double kLogitTolerance = 2e-5;     // relative norm
constexpr double kGradientTolerance = 1e-4;  // likewise

// The whole comparison is a relative norm, the measure; NaN makes it infinite.
void expect_close(const View& got, const View& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  EXPECT_LT(relative_norm(got, values_of(want)), tolerance) << what;
}

// Angles are equal modulo 2 pi. Their size is that of a turn, so the difference is taken relative
// to it.
void expect_close_angles(const View& got, const View& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  constexpr double turn = 2 * std::numbers::pi;
  double square = 0;
  for (int64_t i = 0; i < want.size(); ++i) {
    const double difference = std::remainder(value_of(got, i) - value_of(want, i), turn);
    square += difference * difference;
  }
  EXPECT_LT(std::sqrt(square / static_cast<double>(want.size())) / turn, kLogitTolerance) << what;
}

class Goldens : public ::testing::TestWithParam<std::filesystem::path> {
 protected:
  // Logits (B, T, V), the first `prompt` positions in one call and the rest one by one.
  Tensor logits(Engine& engine, int64_t prompt) {
    const int64_t B = golden_.ids.dim(0), T = golden_.ids.dim(1);
    Tensor out({B, T, golden_.model.config.vocab_padded});
    engine.append(golden_.ids.slice(1, 0, prompt), out.view().slice(1, 0, prompt));
    for (int64_t t = prompt; t < T; ++t)
      engine.append(golden_.ids.slice(1, t, t + 1), out.view().slice(1, t, t + 1));
    return out;
  }
  void expect_logits(int64_t prompt) {
    Engine engine(golden_.model, golden_.ids.dim(0), 2);
    const Tensor got = logits(engine, prompt);
    expect_close(got, golden_.expected.at("logits"), kLogitTolerance, "logits");
    expect_states(engine);
  }
  void expect_states(Engine& engine) {
    for (int64_t layer = 0; layer < golden_.model.config.n_layer; ++layer) {
      if (golden_.model.config.is_attention(layer)) continue;
      for (const char* what : {"angle", "ssm", "k", "v"}) {
        const std::string got_name = fmt::format("layers.{}.{}", layer, what);
        const std::string want_name = fmt::format("state.{}.{}", layer, what);
        const View& got = engine.states().tensors().at(got_name);
        const View& want = golden_.expected.at(want_name);
        ASSERT_EQ(got.shape(), want.shape()) << want_name;
        if (want_name.ends_with("angle")) {
          expect_close_angles(got, want, want_name);
        } else {
          expect_close(got, want, kLogitTolerance, want_name);
        }
      }
    }
  }

  Golden golden_{GetParam()};
};

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Goldens);
INSTANTIATE_TEST_SUITE_P(All, Goldens, ::testing::ValuesIn(golden_folders()), golden_test_name);

// Says that the suite above is smaller than it could be.
TEST(SharedGoldens, ArePresent) {
  if (!std::filesystem::is_directory(MAMBA3_SHARED "/goldens"))
    GTEST_SKIP() << "no " MAMBA3_SHARED "/goldens here: only those in tests/data were compared";
  EXPECT_GE(golden_folders().size(), 8u);
}

TEST_P(Goldens, DialectIsRecognised) {
  const bool heavy_tail = golden_.model.config.mixer.decay_act == DecayAct::heavy_tail;
  EXPECT_EQ(heavy_tail ? "heavy_tail" : "softplus", golden_.dialect);
}

TEST_P(Goldens, LogitsAndStatesInOnePass) {
  expect_logits(golden_.ids.dim(1));
}
TEST_P(Goldens, LogitsAndStatesTokenByToken) {
  expect_logits(1);
}
TEST_P(Goldens, LogitsAndStatesFromAPromptOf17) {
  expect_logits(17);
}

TEST_P(Goldens, StreamAfterEachBlock) {
  const Config& config = golden_.model.config;
  const int64_t M = golden_.ids.size();
  Context ctx(2);
  const NamedTensors memory = allocate(activation_table(config, M, Keep::nothing));
  const ModelActivations activations = resolve_activations(config, memory, M);
  std::vector<Tensor> residuals;
  std::vector<View> views;
  for (int64_t layer = 0; layer < config.n_layer; ++layer)
    views.push_back(residuals.emplace_back(Tensor({M, config.D})));
  model_forward(ctx, golden_.model,
                {.ids = golden_.ids, .activations = activations, .residuals = views});
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string name = fmt::format("residual.{}", layer);
    expect_close(views[static_cast<size_t>(layer)], golden_.expected.at(name), kLogitTolerance,
                 name);
  }
}

// The name that the reference package gave to a parameter's gradient.
std::string gradient_name(const TensorFile& expected, const std::string& parameter) {
  const bool fla = std::any_of(expected.tensors.begin(), expected.tensors.end(), [](const auto& t) {
    return t.name == "grad.backbone.embeddings.weight";
  });
  if (fla && parameter == "backbone.embedding.weight") return "grad.backbone.embeddings.weight";
  return "grad." + parameter;
}

TEST_P(Goldens, LossAndAllGradients) {
  LanguageModel& model = golden_.model;
  model.config.vocab = model.config.vocab_padded;  // the reference took the padding along
  const int64_t B = golden_.ids.dim(0), T = golden_.ids.dim(1), M = B * T;
  Tensor targets({B, T}, DType::i32), nll({M});
  for (int64_t i = 0; i < M; ++i)
    targets.set(i, (i + 1) % T == 0 ? -1 : value_of(golden_.ids, i + 1));
  const double scored = static_cast<double>(B * (T - 1));
  Context ctx(2);
  const NamedTensors memory = allocate(activation_table(model.config, M, Keep::for_backward));
  const ModelActivations activations = resolve_activations(model.config, memory, M);
  const TinyGradients gradients = tiny_gradients(model.config);
  model_forward(ctx, model, {.ids = golden_.ids, .activations = activations});
  model_loss(ctx, model,
             {.activations = activations,
              .targets = targets.view().reshape({M}),
              .nll = nll,
              .gradients = &gradients.views,
              .scale = static_cast<float>(1 / scored)});
  model_backward(ctx, model,
                 {.ids = golden_.ids, .activations = activations, .gradients = gradients.views});
  double loss = 0;
  for (const double nats : nll.values()) loss += nats / scored;
  EXPECT_NEAR(loss, golden_.loss, 1e-5 * golden_.loss);
  for (const std::string& name : gradients.tensors.names()) {
    expect_close(gradients.tensors.at(name),
                 golden_.expected.at(gradient_name(golden_.expected, name)), kGradientTolerance,
                 name);
  }
}

TEST_P(Goldens, GreedyTokensFromTheLogits) {
  ASSERT_GT(golden_.greedy_margin, 1e-3) << "rounding may decide";
  for (const int64_t split : {17, 1, 7}) {
    Engine engine(golden_.model);
    const std::vector<int32_t>& prompt = golden_.greedy_prompt;
    const auto T = std::ssize(prompt);
    const View ids = view_of(prompt.data(), {1, T});
    engine.append(ids.slice(1, 0, split));
    for (int64_t t = split; t < T; ++t) engine.append(ids.slice(1, t, t + 1));
    std::vector<int32_t> drawn;
    while (drawn.size() < golden_.greedy_tokens.size()) {
      Tensor logits({1, golden_.model.config.vocab_padded});
      engine.last_logits(logits);
      const float* values = logits.view().as<float>();
      drawn.push_back(
          static_cast<int32_t>(std::max_element(values, values + golden_.greedy_vocab) - values));
      engine.append(view_of(&drawn.back(), {1, 1}));
    }
    EXPECT_EQ(drawn, golden_.greedy_tokens) << "split " << split;
  }
}

// Up to the first id that the reference left out of its draw.
void expect_greedy(const Golden& golden, std::vector<int32_t> got) {
  ASSERT_EQ(got.size(), golden.greedy_tokens.size());
  const auto end =
      std::find_if(got.begin(), got.end(), [&](int32_t id) { return id >= golden.greedy_vocab; });
  const auto n = end - got.begin();
  EXPECT_GE(n, 5);
  const auto want = golden.greedy_tokens.begin();
  EXPECT_EQ(std::vector(got.begin(), end), std::vector(want, want + n));
}

TEST_P(Goldens, SessionGeneratesTheGreedyTokens) {
  Session session(Model::load(GetParam()));
  GenerateOptions options;
  options.max_tokens = std::ssize(golden_.greedy_tokens);
  options.sampling.temperature = 0;
  expect_greedy(golden_,
                generate(session, std::span<const int32_t>(golden_.greedy_prompt), options).tokens);
}

TEST_P(Goldens, ProgramGeneratesTheGreedyTokens) {
  const ProgramResult result =
      run_program({"generate", "-m", GetParam(), "--prompt-tokens",
                   fmt::format("{}", fmt::join(golden_.greedy_prompt, ",")), "-n",
                   std::to_string(golden_.greedy_tokens.size()), "--temp", "0", "--print-tokens"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  expect_greedy(golden_, nlohmann::json::parse(result.out).get<std::vector<int32_t>>());
}

TEST_P(Goldens, ProgramWritesTheLogits) {
  const TempFolder folder;
  nlohmann::json ids = nlohmann::json::array();
  const int64_t B = golden_.ids.dim(0), T = golden_.ids.dim(1);
  for (int64_t b = 0; b < B; ++b) {
    const int32_t* row = golden_.ids.select(0, b).as<int32_t>();
    ids.push_back(std::vector<int32_t>(row, row + T));
  }
  write_file(folder / "ids.json", ids.dump());
  for (const std::string split : {"", "1", "17"}) {
    std::vector<std::string> args = {"logits",
                                     "-m",
                                     GetParam(),
                                     "--tokens",
                                     folder / "ids.json",
                                     "-o",
                                     folder / "out.safetensors"};
    if (!split.empty()) args.insert(args.end(), {"--split", split});
    const ProgramResult result = run_program(args);
    ASSERT_EQ(result.exit_code, 0) << result.err;
    const TensorFile out = read_safetensors(folder / "out.safetensors");
    const View& logits = out.at("logits");
    ASSERT_EQ(logits.shape(), golden_.expected.at("logits").shape());
    expect_close(logits, golden_.expected.at("logits"), kLogitTolerance, "split " + split);
  }
}

}  // namespace
}  // namespace mamba3::testing
