// The commands that run a model: info, generate, perplexity, logits; and the example program.

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/memory.h"
#include "formats/safetensors.h"
#include "mamba3/generate.h"
#include "model/checkpoint.h"
#include "support/files.h"
#include "support/program.h"
#include "support/temp_folder.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

using Json = nlohmann::json;

class ModelCommands : public ::testing::Test {
 protected:
  std::string model(std::string_view config = "siso") {
    return save_tiny_checkpoint(folder_.path(), config);
  }
  // A prompt of bytes that the tiny models (61 ids) know.
  std::string prompt() const { return "\x01\x02\x03\x04"; }
  std::string write(std::string_view name, std::string_view text) {
    write_file(folder_ / name, text);
    return folder_ / name;
  }
  // Runs it, expecting exit code 2 and a message that contains all the parts.
  void refuses(const std::vector<std::string>& args, std::initializer_list<const char*> parts) {
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_EQ(result.out, "");
    for (const char* part : parts)
      EXPECT_NE(result.err.find(part), std::string::npos) << part << " in: " << result.err;
  }

  TempFolder folder_;
};

bool contains(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

TEST_F(ModelCommands, HelpIsComplete) {
  for (const char* command : {"info", "generate", "perplexity", "logits"}) {
    const ProgramResult result = run_program({command, "--help"});
    EXPECT_EQ(result.exit_code, 0);
    EXPECT_TRUE(contains(result.out, "--model")) << result.out;
    EXPECT_TRUE(contains(run_program({"--help"}).out, command));
  }
}

TEST_F(ModelCommands, InfoDescribesTheModel) {
  const ProgramResult result = run_program({"info", "-m", model("hybrid")});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  for (const char* part : {"SISO", "3 layers", "attention in layers 1", "heavy_tail", "61 ids",
                           "tied", "parameters", "per sequence", "per token", "tokenizer"}) {
    EXPECT_TRUE(contains(result.out, part)) << part << " in:\n" << result.out;
  }
}

TEST_F(ModelCommands, InfoDescribesTheGpu) {
  if (!cuda::available()) {
    refuses({"info", "--device"}, {"no "});
    return;
  }
  const ProgramResult result = run_program({"info", "--device"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  for (const char* part : {"compute capability", "scan", "its backward", "decode", "loss"}) {
    EXPECT_TRUE(contains(result.out, part)) << part << " in:\n" << result.out;
  }
  const Json info = Json::parse(run_program({"info", "--device", "--json"}).out);
  EXPECT_GT(info["memory_bytes"], 0);
}

TEST_F(ModelCommands, InfoAsksForAModel) {
  refuses({"info"}, {"-m FOLDER", "--device"});
}

TEST_F(ModelCommands, GenerateWritesManyTexts) {
  const std::string folder = model();
  const std::vector<std::vector<int32_t>> prompts = {{1, 2, 3, 4}, {1, 2, 3, 4}, {9}, {9}};
  BatchOptions options;
  options.generate.max_tokens = 12;
  options.generate.sampling.seed = 7;
  const std::vector<Generation> want = generate_batch(Model::load(folder), prompts, options);

  const std::string file =
      write("prompts.jsonl", "\"\\u0001\\u0002\\u0003\\u0004\"\n\n{\"prompt\": \"\\t\"}\n");
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {"generate", "-m", folder,    "-n", "12",
                                     "--seed",   "7",  "--batch", "2"};
    args.insert(args.end(), more.begin(), more.end());
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result.out;
  };
  std::string texts;
  for (size_t i = 0; i < want.size(); ++i) {
    texts += "--- " + std::to_string(i) + " ---\n" + want[i].text + "\n";
  }
  EXPECT_EQ(with({"--prompts", file}), texts);
  std::istringstream lines(with({"--prompts", file, "--json", "--parallel", "3"}));
  std::string line;
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_TRUE(std::getline(lines, line));
    const Json json = Json::parse(line);
    EXPECT_EQ(json["index"], i);
    EXPECT_EQ(json["prompt"], i / 2);
    EXPECT_EQ(json["tokens"], Json(want[i].tokens));
    EXPECT_EQ(json["text"], want[i].text);
    EXPECT_EQ(json["finish_reason"], "length");
  }
  EXPECT_FALSE(std::getline(lines, line));
  EXPECT_EQ(with({"--prompt-tokens", "1,2,3,4", "--print-tokens"}),
            Json(want[0].tokens).dump() + "\n" + Json(want[1].tokens).dump() + "\n");

  refuses({"generate", "-m", folder, "--prompts", write("bad", "\"a\"\n[1]\n")},
          {"line 2", "JSON string"});
  refuses({"generate", "-m", folder, "--prompts", write("none", "\n")}, {"has no prompts"});
  refuses({"generate", "-m", folder, "--batch", "2", "-p", prompt(), "--save-state", "x"},
          {"--batch"});
}

TEST_F(ModelCommands, InfoAsJsonIsExact) {
  const Config config = tiny_config("mimo");
  const ProgramResult result = run_program({"info", "-m", model("mimo"), "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  const Json info = Json::parse(result.out);
  EXPECT_EQ(info["parameters"], parameter_count(config));
  EXPECT_EQ(info["weight_bytes"], 4 * parameter_count(config));
  EXPECT_EQ(info["state_bytes"], state_bytes(config, 0));
  EXPECT_EQ(info["mimo"], true);
  EXPECT_EQ(info["mimo_rank"], 4);
  EXPECT_EQ(info["decay"], "heavy_tail");
  EXPECT_EQ(info["warnings"], Json::array());
}

TEST_F(ModelCommands, DecayOverridesTheDialect) {
  const std::string folder = model();
  const ProgramResult result = run_program({"info", "-m", folder, "--decay", "softplus", "--json"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Json::parse(result.out)["decay"], "softplus");
  refuses({"info", "-m", folder, "--decay", "linear"}, {"--decay", "linear", "softplus"});
}

TEST_F(ModelCommands, WeightsThatAreNotFiniteAreAWarning) {
  const Config config = tiny_config("siso");
  const NamedTensors parameters = tiny_parameters(config, 1);
  parameters.at("backbone.norm_f.weight").as<float>()[3] = NAN;
  save_checkpoint(folder_.path(), config, parameters);
  const ProgramResult result = run_program({"info", "-m", folder_.path()});
  EXPECT_EQ(result.exit_code, 0);
  EXPECT_TRUE(contains(result.err, "warning")) << result.err;
  EXPECT_TRUE(contains(result.err, "backbone.norm_f.weight")) << result.err;
}

TEST_F(ModelCommands, GenerateDrawsWhatTheLibraryDraws) {
  const std::string folder = model();
  GenerateOptions options;
  options.max_tokens = 20;
  options.sampling.seed = 7;
  Session session(Model::load(folder));
  const Generation want = generate(session, prompt(), options);

  const std::vector<std::string> common = {"generate", "-m", folder, "-n", "20", "--seed", "7"};
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> args = common;
    args.insert(args.end(), more.begin(), more.end());
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return result;
  };
  const ProgramResult text = with({"-p", prompt()});
  EXPECT_EQ(text.out, want.text + "\n");
  EXPECT_TRUE(contains(text.err, "prompt: 4 tokens")) << text.err;
  EXPECT_TRUE(contains(text.err, "generation: 20 tokens")) << text.err;
  EXPECT_TRUE(contains(text.err, "tokens/s")) << text.err;
  EXPECT_TRUE(contains(text.err, "seed 7")) << text.err;
  EXPECT_EQ(with({"-p", prompt(), "--echo"}).out, prompt() + want.text + "\n");
  EXPECT_EQ(with({"-f", write("prompt.txt", prompt())}).out, want.text + "\n");
  EXPECT_EQ(with({"-p", prompt(), "--threads", "1"}).out, want.text + "\n");
  const Json ids = want.tokens;
  EXPECT_EQ(Json::parse(with({"--prompt-tokens", "1,2,3,4", "--print-tokens"}).out), ids);
  const Json json = Json::parse(with({"-p", prompt(), "--json"}).out);
  EXPECT_EQ(json["tokens"], ids);
  EXPECT_EQ(json["text"], want.text);
  EXPECT_EQ(json["finish_reason"], "length");
  EXPECT_EQ(json["seed"], 7);
}

TEST_F(ModelCommands, GenerateReadsThePromptFromStdin) {
  const std::string folder = model();
  const std::vector<std::string> args = {"generate", "-m", folder, "-n", "9", "--temp", "0"};
  std::vector<std::string> from_flag = args, from_stdin = args;
  from_flag.insert(from_flag.end(), {"-p", prompt()});
  from_stdin.insert(from_stdin.end(), {"-f", "-"});
  EXPECT_EQ(run_program(from_stdin, prompt()).out, run_program(from_flag).out);
}

TEST_F(ModelCommands, SamplingFlagsReachTheDraw) {
  const std::string folder = model();
  const auto tokens = [&](std::vector<std::string> flags) {
    std::vector<std::string> args = {"generate", "-m", folder,   "-p", prompt(),
                                     "-n",       "30", "--seed", "3",  "--print-tokens"};
    args.insert(args.end(), flags.begin(), flags.end());
    return run_program(args).out;
  };
  const std::string free = tokens({"--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0"});
  const std::string greedy = tokens({"--temp", "0"});
  EXPECT_NE(free, greedy);
  EXPECT_EQ(tokens({"--temp", "2", "--top-k", "1"}), greedy);
  EXPECT_EQ(tokens({"--temp", "2", "--min-p", "1"}), greedy);
  EXPECT_EQ(tokens({"--temp", "2", "--top-p", "1e-6"}), greedy);
  EXPECT_NE(tokens({"--temp", "0", "--repeat-penalty", "1000"}), greedy);
  EXPECT_EQ(tokens({"--temp", "0", "--repeat-penalty", "1000", "--repeat-window", "0"}), greedy);
}

TEST_F(ModelCommands, StopEndsTheText) {
  const std::string folder = model();
  const std::vector<std::string> args = {
      "generate", "-m", folder, "--prompt-tokens", "1,2,3", "-n", "40", "--temp", "0"};
  const std::string whole = run_program(args).out;
  ASSERT_GT(whole.size(), 10u);
  std::vector<std::string> stopped = args;
  stopped.insert(stopped.end(), {"--stop", "never there", "--stop", whole.substr(5, 3)});
  const ProgramResult result = run_program(stopped);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.out, whole.substr(0, whole.find(whole.substr(5, 3))) + "\n");
}

TEST_F(ModelCommands, SavedStatesContinueTheText) {
  for (const char* config : {"siso", "mimo", "hybrid"}) {
    const std::string folder = model(config), state = folder_ / "state";
    const auto run = [&](std::vector<std::string> more) {
      std::vector<std::string> args = {"generate", "-m", folder, "--seed", "5", "--print-tokens"};
      args.insert(args.end(), more.begin(), more.end());
      const ProgramResult result = run_program(args);
      EXPECT_EQ(result.exit_code, 0) << result.err;
      return result.exit_code == 0 ? Json::parse(result.out) : Json();
    };
    Json parts = run({"-p", prompt(), "-n", "6", "--save-state", state});
    for (const Json& token : run({"--load-state", state, "-n", "8"})) parts.push_back(token);
    EXPECT_EQ(parts, run({"-p", prompt(), "-n", "14"})) << config;
  }
}

TEST_F(ModelCommands, AStateOfAnotherModelIsRefused) {
  const std::string state = folder_ / "state";
  ASSERT_EQ(run_program(
                {"generate", "-m", model("siso"), "-p", prompt(), "-n", "2", "--save-state", state})
                .exit_code,
            0);
  refuses({"generate", "-m", model("mimo"), "--load-state", state},
          {"state of another model", state.c_str()});
}

TEST_F(ModelCommands, GenerateSaysWhatIsWrong) {
  const std::string folder = model();
  const auto with = [&](std::vector<std::string> more, std::initializer_list<const char*> parts) {
    std::vector<std::string> args = {"generate", "-m", folder};
    args.insert(args.end(), more.begin(), more.end());
    refuses(args, parts);
  };
  with({}, {"no prompt", "-p TEXT"});
  with({"-p", ""}, {"the prompt is empty"});
  with({"--prompt-tokens", "1,2,61"}, {"token id 61 at position 2", "0 to 60"});
  with({"--prompt-tokens", "1,two"}, {"--prompt-tokens", "two"});
  with({"--prompt-tokens", "1,99999999999"}, {"--prompt-tokens"});
  with({"-p", "a", "--prompt-tokens", "1"}, {"give one of"});
  with({"-f", folder_ / "absent.txt"}, {"absent.txt", "No such file"});
  with({"-f", folder_.path()}, {folder_.path().c_str()});
  with({"-p", "\xff\xfe"}, {"token id 255 at position 0"});
  with({"-p", "x", "-n", "-1"}, {"number of tokens"});
  with({"-p", "x", "-n", "many"}, {"--tokens", "many"});
  with({"-p", "x", "--temp", "-1"}, {"temperature must be 0 or more"});
  with({"-p", "x", "--top-p", "2"}, {"top-p"});
  with({"-p", "x", "--stop", ""}, {"stop"});
  with({"-p", "x", "--threads", "-2"}, {"--threads"});
  with({"-p", "x", "--tmep", "1"}, {"--tmep", "--temp"});
  with({"--load-state", folder_ / "absent.state"}, {"absent.state"});
  with({"--load-state", write("junk", "junk")}, {"junk"});
  refuses({"generate", "-p", "x"}, {"--model"});
  refuses({"generate", "-m", folder_ / "nothing", "-p", "x"}, {"nothing"});
}

TEST_F(ModelCommands, AStateThatCannotBeWrittenIsAFailureAndNotBadInput) {
  const ProgramResult result = run_program({"generate", "-m", model(), "-p", prompt(), "-n", "2",
                                            "--save-state", folder_ / "no-such-folder" / "state"});
  EXPECT_EQ(result.exit_code, 1) << result.err;
  EXPECT_TRUE(contains(result.err, "no-such-folder")) << result.err;
}

// 301 ids, which raw bytes are not, and no tokenizer.json.
TEST_F(ModelCommands, WithoutATokenizerIdsStillWork) {
  const std::string folder = MAMBA3_TEST_DATA "/goldens/siso-odd";
  const std::vector<std::string> args = {"generate", "-m",     folder, "--prompt-tokens",
                                         "7,300",    "--temp", "0"};
  std::vector<std::string> ids = args, with_bytes = args;
  ids.insert(ids.end(), {"--print-tokens", "-n", "3"});
  const ProgramResult result = run_program(ids);
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(Json::parse(result.out).size(), 3u);
  refuses(args, {"this model has no tokenizer", "301 ids", "--tokenizer"});
  refuses({"generate", "-m", folder, "-p", "text", "--print-tokens"}, {"no tokenizer"});
  refuses({"perplexity", "-m", folder, "-f", write("text", "some text")}, {"no tokenizer"});
  EXPECT_EQ(Json::parse(run_program({"info", "-m", folder, "--json"}).out)["tokenizer"], Json());
  // An id beyond the tokenizer's tokens has no text and is no error.
  with_bytes.insert(with_bytes.end(), {"--tokenizer", "bytes", "-n", "40"});
  EXPECT_EQ(run_program(with_bytes).exit_code, 0);
}

TEST_F(ModelCommands, PerplexityScoresAText) {
  const std::string folder = model();
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * i % 61);
  const std::string file = write("text", text);
  const auto run = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {"perplexity", "-m", folder, "-f", file, "--json"};
    args.insert(args.end(), more.begin(), more.end());
    const ProgramResult result = run_program(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return Json::parse(result.out);
  };
  const Json whole = run({});
  EXPECT_EQ(whole["tokens"], 299);
  EXPECT_EQ(whole["bytes"], 299);
  EXPECT_EQ(whole["context"], 2048);
  const double nats = whole["nats_per_token"];
  EXPECT_NEAR(whole["perplexity"], std::exp(nats), 1e-6 * std::exp(nats));
  EXPECT_NEAR(whole["bits_per_byte"], nats / std::log(2), 1e-9);
  EXPECT_EQ(run({"--context", "50"})["tokens"], 299);
  EXPECT_NE(run({"--context", "50"})["nats_per_token"], whole["nats_per_token"]);
  EXPECT_NEAR(run({"--context", "50", "--carry-state"})["nats_per_token"], nats, 1e-4);

  const ProgramResult people = run_program({"perplexity", "-m", folder, "-f", file});
  for (const char* part : {"bits per byte", "nats per token", "perplexity"})
    EXPECT_TRUE(contains(people.out, part)) << people.out;
}

TEST_F(ModelCommands, PerplexitySaysWhatIsWrong) {
  const std::string folder = model();
  refuses({"perplexity", "-m", folder, "-f", write("empty", "")}, {"empty", "nothing to score"});
  refuses({"perplexity", "-m", folder, "-f", write("one", "\x01")}, {"at least two tokens"});
  refuses({"perplexity", "-m", folder, "-f", write("text", "\x01\x02zz")},
          {"token id 122 at position 2"});
  refuses({"perplexity", "-m", folder, "-f", folder_ / "absent"}, {"absent"});
  refuses({"perplexity", "-m", folder}, {"--file"});
  refuses({"perplexity", "-m", folder, "-f", "x", "--context", "0"}, {"--context"});
}

TEST_F(ModelCommands, LogitsSplitAgrees) {
  for (const TinyConfig& tiny : tiny_configs()) {
    const std::string folder = model(tiny.name), out = folder_ / "out";
    const std::string ids = write("ids.json", "[[1,2,3,4,5,6,7,8],[9,8,7,6,5,4,3,2]]");
    const auto logits = [&](std::vector<std::string> more) {
      std::vector<std::string> args = {"logits", "-m", folder, "--tokens", ids, "-o", out};
      args.insert(args.end(), more.begin(), more.end());
      const ProgramResult result = run_program(args);
      EXPECT_EQ(result.exit_code, 0) << result.err;
      const TensorFile file = read_safetensors(std::filesystem::path(out));
      EXPECT_EQ(file.at("logits").shape(), "(2, 8, 64)");
      return values_of(file.at("logits"));
    };
    const std::vector<double> whole = logits({});
    for (const char* split : {"1", "3", "8"}) {
      const std::vector<double> got = logits({"--split", split});
      double difference = 0, norm = 0;
      for (size_t i = 0; i < whole.size(); ++i) {
        difference += (got[i] - whole[i]) * (got[i] - whole[i]);
        norm += whole[i] * whole[i];
      }
      EXPECT_LT(std::sqrt(difference / norm), 2e-5) << tiny.name << " split " << split;
    }
  }
}

TEST_F(ModelCommands, LogitsSaysWhatIsWrong) {
  const std::string folder = model(), out = folder_ / "out";
  const auto with = [&](std::string_view json, std::vector<std::string> more,
                        std::initializer_list<const char*> parts) {
    std::vector<std::string> args = {"logits", "-m", folder, "--tokens", write("ids.json", json),
                                     "-o",     out};
    args.insert(args.end(), more.begin(), more.end());
    refuses(args, parts);
    EXPECT_FALSE(std::filesystem::exists(out));
  };
  constexpr const char* kWanted = "want an array of equal-length arrays of token ids";
  with("[[1,2", {}, {"is not JSON", kWanted});
  with("{}", {}, {kWanted});
  with("[]", {}, {kWanted});
  with("[1,2]", {}, {"sequence 0 is not an array", kWanted});
  with("[[]]", {}, {"sequence 0 is empty", kWanted});
  with("[[1,2],[3]]", {}, {"sequence 1 has 1 tokens and sequence 0 has 2", kWanted});
  with("[[1,\"a\"]]", {}, {"element 1 of sequence 0 is \"a\", want a token id"});
  with("[[1,2.5]]", {}, {"2.5"});
  with("[[1,99999999999]]", {}, {"99999999999", "out of range"});
  with("[[1,18446744073709551615]]", {}, {"out of range"});
  with("[[1,2],[3,61]]", {}, {"token id 61 at position 1 of sequence 1", "0 to 60"});
  with("[[1,-2]]", {}, {"-2", "out of range"});
  with("[[1,2]]", {"--split", "0"}, {"--split 0", "want 1 to 2"});
  with("[[1,2]]", {"--split", "3"}, {"--split 3", "want 1 to 2"});
  refuses({"logits", "-m", folder, "--tokens", folder_ / "absent", "-o", out}, {"absent"});
}

TEST_F(ModelCommands, TheExampleLoadsAFolderAndGenerates) {
  const std::string example = MAMBA3_EXAMPLES "/generate";
  const ProgramResult result = run_command({example, model(), prompt(), "10"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_TRUE(contains(result.err, "10 tokens, ended by length")) << result.err;
  EXPECT_TRUE(contains(result.err, "61 logits")) << result.err;
  EXPECT_GT(result.out.size(), 1u);
  EXPECT_EQ(run_command({example}).exit_code, 2);
  EXPECT_EQ(run_command({example, folder_ / "nothing", "x"}).exit_code, 1);
}

}  // namespace
}  // namespace mamba3::testing
