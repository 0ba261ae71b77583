#include "infer/state_file.h"

#include <gtest/gtest.h>

#include "formats/safetensors.h"
#include "infer/session_impl.h"
#include "mamba3/generate.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

class StateFile : public ::testing::Test {
 protected:
  Model load(std::string_view config, uint64_t seed = 1) {
    return Model::load(save_tiny_checkpoint(folder_.path(), config, seed));
  }
  // A session with some tokens, saved to file().
  Session saved(const Model& model) {
    Session session(model);
    generate(session, prompt_, {.max_tokens = 10});
    session.save(file());
    return session;
  }
  std::filesystem::path file() const { return folder_ / "state.safetensors"; }

  // Loads file() with something changed, into a session that holds other tokens; returns the
  // message. The session must stay as it was.
  template <typename Change>
  std::string load_changed(const Model& model, Change&& change) {
    saved(model);
    const TensorFile original = read_safetensors(file());
    std::vector<NamedView> tensors;
    for (const StoredTensor& tensor : original.tensors)
      tensors.push_back({tensor.name, tensor.view});
    std::map<std::string, std::string> metadata = original.metadata;
    change(tensors, metadata);
    const auto changed = folder_ / "changed.safetensors";
    write_safetensors(changed, tensors, metadata);
    return load_fails(model, changed);
  }
  std::string load_fails(const Model& model, const std::filesystem::path& path) {
    Session session(model);
    session.append(prompt_);
    const std::span<const float> logits = session.logits();
    const std::vector<float> before(logits.begin(), logits.end());
    const std::string message = input_error_of([&] { session.load(path); });
    EXPECT_EQ(session.length(), 4);
    const std::span<const float> after = session.logits();
    EXPECT_EQ(std::vector<float>(after.begin(), after.end()), before);
    return message;
  }

  TempFolder folder_;
  const std::vector<int32_t> prompt_ = {5, 6, 7, 8};
};

TEST_F(StateFile, ContinuesAsIfNothingHadHappened) {
  for (const TinyConfig& tiny : tiny_configs()) {
    const Model model = load(tiny.name);
    Session session = saved(model), loaded(model);
    loaded.append(prompt_);  // to be forgotten
    loaded.load(file());
    EXPECT_EQ(loaded.length(), 14);
    GenerateOptions options;
    options.max_tokens = 15;
    options.sampling.seed = 4;
    options.sampling.repeat_penalty = 1.5f;
    const std::vector<int32_t> more = {1, 2};
    EXPECT_EQ(generate(loaded, more, options).tokens, generate(session, more, options).tokens)
        << tiny.name;
    // Bit for bit, all tensors.
    const NamedTensors& a = loaded.impl().engine.states().tensors();
    const NamedTensors& b = session.impl().engine.states().tensors();
    for (const std::string& name : b.names())
      EXPECT_EQ(values_of(a.at(name).select(0, 0).slice(0, 0, 1)),
                values_of(b.at(name).select(0, 0).slice(0, 0, 1)))
          << name;
  }
}

TEST_F(StateFile, HoldsAllTensorsOfEveryLayer) {
  saved(load("hybrid"));
  const TensorFile state = read_safetensors(file());
  EXPECT_EQ(state.metadata.at("format"), "mamba3-state");
  EXPECT_EQ(state.metadata.at("format_version"), "1");
  EXPECT_EQ(state.metadata.at("tokens"), "14");
  EXPECT_EQ(state.at("layers.0.angle").shape(), "(4, 4)");
  EXPECT_EQ(state.at("layers.0.ssm").shape(), "(4, 16, 16)");
  EXPECT_EQ(state.at("layers.2.k").shape(), "(1, 4, 16)");
  EXPECT_EQ(state.at("layers.2.v").shape(), "(4, 16)");
  EXPECT_EQ(state.at("layers.1.cache_k").shape(), "(14, 2, 8)");
  EXPECT_EQ(state.at("layers.1.cache_v").shape(), "(14, 2, 8)");
  EXPECT_EQ(state.at("hidden").shape(), "(32)");
  EXPECT_EQ(state.at("recent").shape(), "(14)");
}

TEST_F(StateFile, AnotherModelsStateIsRefused) {
  const Model model = load("siso", 1);
  saved(model);
  const Model dialect = Model::load(folder_ / "siso", {.decay = "softplus"});
  EXPECT_NE(load_fails(dialect, file()).find("is the state of another model"), std::string::npos);
  for (const Model& other : {load("siso", 2), load("mimo", 1)}) {
    const std::string message = load_fails(other, file());
    EXPECT_NE(message.find("is the state of another model"), std::string::npos) << message;
    EXPECT_NE(message.find(file().string()), std::string::npos) << message;
  }
}

TEST_F(StateFile, SaysWhatIsWrongWithAFile) {
  const Model model = load("siso");
  const auto expect = [](const std::string& message, std::string_view part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(load_changed(model, [](auto&, auto& m) { m.erase("format"); }), "is not a saved state");
  expect(load_changed(model, [](auto&, auto& m) { m["format_version"] = "7"; }),
         "has format version 7, this program reads version 1");
  expect(load_changed(model, [](auto&, auto& m) { m["tokens"] = "-3"; }),
         "the number of tokens is '-3', want a positive number");
  expect(load_changed(model, [](auto&, auto& m) { m["tokens"] = "14x"; }),
         "the number of tokens is '14x'");
  expect(load_changed(model,
                      [](auto& tensors, auto&) {
                        std::erase_if(tensors, [](auto& t) { return t.name == "layers.1.k"; });
                      }),
         "tensor layers.1.k is missing");
  expect(load_changed(model,
                      [](auto& tensors, auto&) {
                        for (auto& t : tensors)
                          if (t.name == "layers.1.ssm") t.view = t.view.slice(0, 0, 2);
                      }),
         "tensor layers.1.ssm is f32 (2, 16, 16), want f32 (4, 16, 16)");
  expect(load_changed(model,
                      [](auto& tensors, auto&) {
                        std::erase_if(tensors, [](auto& t) { return t.name == "recent"; });
                      }),
         "recent");
  expect(load_changed(model,
                      [](auto& tensors, auto&) {
                        for (auto& t : tensors)
                          if (t.name == "recent") t.view = tensors.front().view;
                      }),
         "tensor recent is f32");
  expect(load_fails(model, folder_ / "absent"), "absent");
  const std::string whole = read_file(file());
  write_file(folder_ / "short", std::string_view(whole).substr(0, whole.size() - 10));
  expect(load_fails(model, folder_ / "short"), "short");
}

TEST_F(StateFile, ACacheShorterThanTheTokensIsRefused) {
  const Model model = load("hybrid");
  const std::string message = load_changed(model, [](auto&, auto& m) { m["tokens"] = "15"; });
  EXPECT_NE(message.find("tensor layers.1.cache_k is f32 (14, 2, 8), want f32 (15, 2, 8)"),
            std::string::npos)
      << message;
}

TEST_F(StateFile, AnEmptySessionHasNoState) {
  Session session(load("siso"));
  EXPECT_EQ(input_error_of([&] { session.save(file()); }),
            "there is no state to save before the first token");
}

TEST_F(StateFile, AFullDiskLeavesTheOldFile) {
  const Model model = load("siso");
  Session session = saved(model);
  const std::string before = read_file(file());
  session.append(prompt_);
  {
    const FileSizeLimit full(1000);
    EXPECT_NE(error_of([&] { session.save(file()); }).find(file().string()), std::string::npos);
  }
  EXPECT_EQ(read_file(file()), before);
}

}  // namespace
}  // namespace mamba3::testing
