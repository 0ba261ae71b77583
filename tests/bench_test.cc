#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "bench/cases.h"
#include "bench/model.h"
#include "bench/ops.h"
#include "support/program.h"

namespace mamba3 {
namespace {

using testing::run_program;

TEST(Bench, ACaseVariesOneThing) {
  const bench::LinearCase base{.M = 4, .N = 5, .K = 6};
  const auto cases = bench::linear_cases(base);
  EXPECT_EQ(cases.front().name, "base");
  EXPECT_EQ(cases.front().shape(), base.shape());
  for (const auto& c : cases) {
    const int changes = (c.M != base.M) + (c.N != base.N) + (c.K != base.K) +
                        (c.dtype != base.dtype) + c.bias + c.accumulate + c.strided;
    EXPECT_EQ(changes, c.name == "base" ? 0 : c.name == "odd" ? 3 : 1) << c.name;
  }
}

TEST(Bench, EveryOpHasABaseCaseAndNamesAreUnique) {
  std::map<std::string, std::set<std::string>> names;
  for (const bench::Benchmark& benchmark : bench::op_benchmarks()) {
    EXPECT_TRUE(names[benchmark.op].insert(benchmark.name).second)
        << benchmark.op << " has two cases " << benchmark.name;
    EXPECT_GT(benchmark.work.bytes, 0) << benchmark.op;
  }
  for (const auto& [op, cases] : names) EXPECT_TRUE(cases.contains("base")) << op;
  for (const char* op : {"embedding", "rms_norm", "linear", "mixer_scan", "mixer_step", "swiglu",
                         "attention", "attention_step", "cross_entropy", "adamw", "sample"}) {
    EXPECT_TRUE(names.contains(op)) << op;
  }
}

TEST(Bench, FlopsOfTheChunkedScan) {
  MixerShape siso{.H = 1, .P = 64, .N = 128};
  EXPECT_EQ(bench::mixer_scan_flops(siso, 1), 2 * 64 * 128 + 2 * 64 * 64 + 4 * 128 * 64);
  MixerShape mimo = siso;
  mimo.R = 4, mimo.mimo = true;  // chunks of 16 tokens are 64 rows too
  EXPECT_EQ(bench::mixer_scan_flops(mimo, 10), 40 * bench::mixer_scan_flops(siso, 1));
}

TEST(Bench, PrintsAJsonObjectALine) {
  const auto result =
      run_program({"bench", "-o", "swiglu,mixer_step", "--json", "--min-time", "0.001"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  std::istringstream lines(result.out);
  std::string line;
  std::getline(lines, line);
  const auto ceiling = nlohmann::json::parse(line);
  EXPECT_EQ(ceiling.at("op"), "ceiling");
  EXPECT_GT(ceiling.at("copy_gb_per_s"), 0);
  std::set<std::string> ops;
  while (std::getline(lines, line)) {
    const auto row = nlohmann::json::parse(line);
    ops.insert(row.at("op"));
    const double seconds = row.at("median_s"), rate = row.at("gb_per_s");
    EXPECT_GT(seconds, 0);
    EXPECT_NEAR(row.at("copy_fraction"), rate / ceiling.at("copy_gb_per_s").get<double>(), 1e-6);
  }
  EXPECT_EQ(ops, (std::set<std::string>{"swiglu", "mixer_step"}));
}

TEST(Bench, RunsEveryModeOfAModel) {
  bench::ModelSettings settings{.config = published_config("187m-siso"), .name = "tiny"};
  settings.config.D = 32, settings.config.n_layer = 2, settings.config.d_mlp = 128;
  settings.config.vocab = settings.config.vocab_padded = 64;
  settings.config.mixer.H = 4, settings.config.mixer.P = 16;
  settings.config.mixer.N = 16, settings.config.mixer.S = 4;
  settings.tokens = 20, settings.batch = 2, settings.threads = 1;
  Context ctx(1);
  std::vector<std::string> ops;
  for (const bench::Benchmark& benchmark : bench::model_benchmarks(settings)) {
    ops.push_back(benchmark.op);
    EXPECT_GT(bench::median_seconds(ctx, benchmark, {.min_time = 0, .fewest_runs = 2}), 0);
    EXPECT_GT(benchmark.work.flops, 0);
  }
  EXPECT_EQ(ops, (std::vector<std::string>{"model_prefill", "model_decode", "model_train"}));
}

TEST(Bench, SaysWhatIsWrong) {
  const auto unknown = run_program({"bench", "-o", "softmax"});
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_NE(unknown.err.find("there is no op 'softmax'; the ops are ceiling, embedding,"),
            std::string::npos)
      << unknown.err;
  EXPECT_EQ(run_program({"bench", "model", "--size", "3b"}).exit_code, 2);
  EXPECT_EQ(run_program({"bench", "model", "--mode", "prefill,nope"}).exit_code, 2);
  EXPECT_EQ(run_program({"bench", "--min-time", "0"}).exit_code, 2);
  EXPECT_EQ(run_program({"bench", "--threads", "-1"}).exit_code, 2);
}

}  // namespace
}  // namespace mamba3
