#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "infer/engine.h"
#include "mamba3/generate.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/files.h"
#include "support/golden.h"
#include "support/program.h"
#include "support/temp_folder.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

// Relative norms of the difference that are allowed.
struct Bounds {
  double logits, state, gradient, loss;
};

// In bf16 some roundings of 2^-9 a layer, which gradients that are sums of cancelling parts feel
// most, and states because the angle adds up rounded steps over all tokens.
Bounds bounds_of(DType dtype) {
  if (dtype == DType::bf16) {
    return {.logits = 2e-2, .state = 1.5e-1, .gradient = 1e-1, .loss = 2e-3};
  }
  if (test_device() == Device::cuda) {
    return {.logits = 1e-4, .state = 1e-4, .gradient = 1e-4, .loss = 1e-5};
  }
  return {.logits = 2e-5, .state = 2e-5, .gradient = 1e-4, .loss = 1e-5};
}

// The whole comparison is a relative norm, the measure; NaN makes it infinite.
void expect_close(const View& got, const View& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  EXPECT_LT(relative_norm(got, values_of(want)), tolerance) << what;
}

// Angles are equal modulo 2 pi. Their size is that of a turn, so the difference is taken relative
// to it.
void expect_close_angles(const View& any, const View& want, double bound, const std::string& what) {
  const HostCopy copied = host_copy(any);
  const View& got = copied.view;
  ASSERT_EQ(got.size(), want.size()) << what;
  constexpr double turn = 2 * std::numbers::pi;
  double square = 0;
  for (int64_t i = 0; i < want.size(); ++i) {
    const double difference = std::remainder(value_of(got, i) - value_of(want, i), turn);
    square += difference * difference;
  }
  EXPECT_LT(std::sqrt(square / static_cast<double>(want.size())) / turn, bound) << what;
}

using GoldenCase = std::tuple<std::filesystem::path, DType>;

class Goldens : public ::testing::TestWithParam<GoldenCase> {
 protected:
  // Logits (B, T, V), the first `prompt` positions in one call and the rest one by one.
  Tensor logits(Engine& engine, int64_t prompt) {
    const int64_t B = golden_.ids.dim(0), T = golden_.ids.dim(1);
    Tensor out({B, T, golden_.model.config.vocab_padded});
    engine.append(golden_.ids.slice(1, 0, prompt), out.host().slice(1, 0, prompt));
    for (int64_t t = prompt; t < T; ++t)
      engine.append(golden_.ids.slice(1, t, t + 1), out.host().slice(1, t, t + 1));
    return out;
  }
  void expect_logits(int64_t prompt) {
    Engine engine(model_, golden_.ids.dim(0), 2);
    const Tensor got = logits(engine, prompt);
    expect_close(got.host(), golden_.expected.at("logits"), bounds_.logits, "logits");
    expect_states(engine);
  }
  void expect_states(Engine& engine) {
    const NamedTensors& states = engine.states().tensors();
    for (const std::string& name : states.names()) {
      if (name.find(".cache_") != std::string::npos) continue;  // of attention
      const std::string want_name = "state" + name.substr(std::string_view("layers").size());
      const View& got = states.at(name);
      const View& want = golden_.expected.at(want_name);
      ASSERT_EQ(got.shape(), want.shape()) << want_name;
      if (want_name.ends_with("angle")) {
        expect_close_angles(got, want, bounds_.state, want_name);
      } else {
        expect_close(got, want, bounds_.state, want_name);
      }
    }
  }

  // The ids of the golden where the context is.
  Tensor ids() const {
    return Tensor::of({golden_.ids.dim(0), golden_.ids.dim(1)}, values_of(golden_.ids), DType::i32);
  }

  const std::filesystem::path folder_ = std::get<0>(GetParam());
  const DType dtype_ = std::get<1>(GetParam());
  const Bounds bounds_ = bounds_of(dtype_);
  const std::string device_{name_of(test_device())};
  Golden golden_{folder_};
  Context ctx_ = make_context(2);
  LanguageModel model_ = place_language_model(ctx_, golden_.model, dtype_);
};

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(Goldens);
INSTANTIATE_TEST_SUITE_P(All, Goldens,
                         ::testing::Combine(::testing::ValuesIn(golden_folders()),
                                            ::testing::ValuesIn(test_dtypes())),
                         [](const auto& row) {
                           return golden_name(std::get<0>(row.param)) + "_" +
                                  std::string(name_of(std::get<1>(row.param)));
                         });

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
  const NamedTensors memory =
      allocate(activation_table(config, M, Keep::nothing, dtype_), ctx_.device);
  const ModelActivations activations = resolve_activations(config, memory, M);
  std::vector<Tensor> residuals;
  std::vector<View> views;
  for (int64_t layer = 0; layer < config.n_layer; ++layer)
    views.push_back(residuals.emplace_back(Tensor({M, config.D})));
  const Tensor tokens = ids();
  model_forward(ctx_, model_, {.ids = tokens, .activations = activations, .residuals = views});
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string name = fmt::format("residual.{}", layer);
    expect_close(views[static_cast<size_t>(layer)], golden_.expected.at(name), bounds_.logits,
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
  LanguageModel& model = model_;
  model.config.vocab = model.config.vocab_padded;  // the reference took the padding along
  const int64_t B = golden_.ids.dim(0), T = golden_.ids.dim(1), M = B * T;
  Tensor targets({B, T}, DType::i32), nll({M});
  for (int64_t i = 0; i < M; ++i)
    targets.set(i, (i + 1) % T == 0 ? -1 : value_of(golden_.ids, i + 1));
  const double scored = static_cast<double>(B * (T - 1));
  const Tensor scale = Tensor::of({1}, std::vector{1 / scored});
  const NamedTensors memory =
      allocate(activation_table(model.config, M, Keep::for_backward, dtype_), ctx_.device);
  const ModelActivations activations = resolve_activations(model.config, memory, M);
  const NamedTensors gradients = allocate(parameter_table(model.config), ctx_.device);
  const ModelWeights gradient_views = resolve_weights(model.config, gradients);
  const Tensor tokens = ids();
  model_forward(ctx_, model, {.ids = tokens, .activations = activations});
  model_loss(ctx_, model,
             {.activations = activations,
              .targets = targets.view().reshape({M}),
              .nll = nll,
              .gradients = &gradient_views,
              .scale = scale});
  model_backward(ctx_, model,
                 {.ids = tokens, .activations = activations, .gradients = gradient_views});
  double loss = 0;
  for (const double nats : nll.values()) loss += nats / scored;
  EXPECT_NEAR(loss, golden_.loss, bounds_.loss * golden_.loss);
  for (const std::string& name : gradients.names()) {
    expect_close(gradients.at(name), golden_.expected.at(gradient_name(golden_.expected, name)),
                 bounds_.gradient, name);
  }
}

TEST_P(Goldens, GreedyTokensFromTheLogits) {
  if (dtype_ != DType::f32) GTEST_SKIP() << "rounding may decide";
  ASSERT_GT(golden_.greedy_margin, 1e-3) << "rounding may decide";
  for (const int64_t split : {17, 1, 7}) {
    Engine engine(model_);
    const std::vector<int32_t>& prompt = golden_.greedy_prompt;
    const auto T = std::ssize(prompt);
    const View ids = view_of(prompt.data(), {1, T});
    engine.append(ids.slice(1, 0, split));
    for (int64_t t = split; t < T; ++t) engine.append(ids.slice(1, t, t + 1));
    std::vector<int32_t> drawn;
    while (drawn.size() < golden_.greedy_tokens.size()) {
      Tensor logits({1, golden_.model.config.vocab_padded});
      engine.last_logits(logits.host());
      const float* values = logits.host().as<float>();
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
  if (dtype_ != DType::f32) GTEST_SKIP() << "rounding may decide";
  Session session(Model::load(folder_, {.device = device_, .dtype = "f32"}));
  GenerateOptions options;
  options.max_tokens = std::ssize(golden_.greedy_tokens);
  options.sampling.temperature = 0;
  expect_greedy(golden_,
                generate(session, std::span<const int32_t>(golden_.greedy_prompt), options).tokens);
}

TEST_P(Goldens, ProgramGeneratesTheGreedyTokens) {
  if (dtype_ != DType::f32) GTEST_SKIP() << "rounding may decide";
  const ProgramResult result = run_program(
      {"generate", "-m", folder_, "--device", device_, "--dtype", "f32", "--prompt-tokens",
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
                                     folder_,
                                     "--device",
                                     device_,
                                     "--dtype",
                                     std::string(name_of(dtype_)),
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
    expect_close(logits, golden_.expected.at("logits"), bounds_.logits, "split " + split);
  }
}

}  // namespace
}  // namespace mamba3::testing
