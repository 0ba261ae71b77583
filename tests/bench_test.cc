#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "bench/cases.h"
#include "bench/model.h"
#include "bench/ops.h"
#include "bench/report.h"
#include "support/device.h"
#include "support/errors.h"
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
  for (const char* op :
       {"embedding", "rms_norm", "grouped_rms_norm", "linear", "mixer_scan", "mixer_step",
        "delta_scan", "delta_step", "swiglu", "linear_swiglu", "short_conv", "rotary", "attention",
        "attention_step", "cross_entropy", "adamw", "sample"}) {
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

TEST(Bench, MeasuresOpsOnTheGpu) {
  if (testing::test_device() == Device::cpu) GTEST_SKIP() << "needs a GPU";
  const auto result = run_program(
      {"bench", "-o", "swiglu,mixer_scan", "--json", "--min-time", "0.001", "--device", "cuda"});
  ASSERT_EQ(result.exit_code, 0) << result.err;
  std::istringstream lines(result.out);
  std::string line;
  std::getline(lines, line);
  const auto ceiling = nlohmann::json::parse(line);
  EXPECT_GT(ceiling.at("copy_gb_per_s"), 0);
  EXPECT_GT(ceiling.at("bf16_matrix_gflop_per_s"), 0);
  std::set<std::string> ops;
  while (std::getline(lines, line)) {
    const auto row = nlohmann::json::parse(line);
    ops.insert(row.at("op"));
    EXPECT_GT(row.at("median_s"), 0) << line;
    EXPECT_GT(row.at("copy_fraction"), 0) << line;
  }
  EXPECT_EQ(ops, (std::set<std::string>{"swiglu", "mixer_scan"}));

  const auto table =
      run_program({"bench", "-o", "swiglu", "--min-time", "0.001", "--device", "cuda"});
  EXPECT_EQ(table.exit_code, 0) << table.err;
  EXPECT_EQ(table.out.rfind("GPU; ceilings: copy ", 0), 0u) << table.out;
  EXPECT_NE(table.out.find("\nswiglu "), std::string::npos) << table.out;
}

TEST(Bench, RunsEveryModeOfAModel) {
  bench::ModelSettings settings{.config = published_config("187m-siso"), .name = "tiny"};
  settings.config.D = 32, settings.config.n_layer = 2, settings.config.d_mlp = 128;
  settings.config.vocab = settings.config.vocab_padded = 64;
  settings.config.mixer.H = 4, settings.config.mixer.P = 16;
  settings.config.mixer.N = 16, settings.config.mixer.S = 4;
  settings.tokens = 20, settings.batch = 2, settings.threads = 1;
  settings.device = testing::test_device();
  Context ctx = testing::make_context(1);
  std::vector<std::string> ops;
  for (const bench::Benchmark& benchmark : bench::model_benchmarks(settings)) {
    ops.push_back(benchmark.op);
    const bool profile = settings.device == Device::cuda;
    const bench::Measurement measured =
        bench::measure(ctx, benchmark, {.min_time = 0, .fewest_runs = 2, .profile = profile});
    EXPECT_GT(measured.seconds, 0);
    EXPECT_GT(benchmark.work.flops, 0);
    EXPECT_EQ(measured.profile.empty(), !profile);
    EXPECT_EQ(measured.peak_bytes > 0, profile);
  }
  EXPECT_EQ(ops, (std::vector<std::string>{"model_prefill", "model_decode", "model_train"}));
}

TEST(Bench, OnTheGpuAllThatIsMultipliedHasOneType) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bench::Benchmark& b : bench::op_benchmarks({Device::cuda, dtype})) {
      EXPECT_EQ(b.dtype, dtype) << b.op << " " << b.name;
      const std::string other = dtype == DType::f32 ? "bf16" : "f32";
      EXPECT_EQ(b.shape.find(other), std::string::npos) << b.op << " " << b.shape;
      EXPECT_NE(b.name, "f16") << b.op;
    }
  }
}

TEST(Bench, ReportsAModelOnTheGpu) {
  const bench::Ceilings ceilings{.copy = 2e12, .matrix = 5e13, .matrix_bf16 = 8e14};
  const bench::Benchmark benchmark{.op = "model_decode",
                                   .name = "tiny",
                                   .shape = "B=4 bf16",
                                   .work = {.bytes = 1e9, .flops = 4e11},
                                   .dtype = DType::bf16,
                                   .tokens = 4,
                                   .prepare = {}};
  const bench::Measurement measured{.seconds = 1e-3,
                                    .peak_bytes = 2'500'000'000,
                                    .profile = {{"linear", 6, 3e-4}, {"swiglu", 2, 1e-4}}};
  bench::Report table(false, Device::cuda, 1, ceilings);
  EXPECT_EQ(table.head(),
            "GPU; ceilings: copy 2000 GB/s, matrix product 800000 GFLOP/s in bf16, 50000 in f32\n");
  const std::string first = table.row(benchmark, measured);
  EXPECT_NE(first.find("of matrix   tokens/s    memory\n"), std::string::npos) << first;
  EXPECT_NE(first.find(" 1000.0     50% 400000.0       50%     4000.0   2.50 GB\n"),
            std::string::npos)
      << first;
  EXPECT_EQ(table.row(benchmark, measured).find("tokens/s"), std::string::npos);  // once is enough
  EXPECT_EQ(table.profile(benchmark, measured),
            "  linear                75.0%  300.00 us in 6 launches\n"
            "  swiglu                25.0%  100.00 us in 2 launches\n");

  bench::Report json(true, Device::cuda, 1, ceilings);
  EXPECT_EQ(nlohmann::json::parse(json.head()).at("bf16_matrix_gflop_per_s"), 8e5);
  const auto row = nlohmann::json::parse(json.row(benchmark, measured));
  EXPECT_EQ(row.at("tokens_per_s"), 4000);
  EXPECT_EQ(row.at("peak_bytes"), 2'500'000'000);
  EXPECT_NEAR(row.at("matrix_fraction"), 0.5, 1e-12);
  const auto profile = nlohmann::json::parse(json.profile(benchmark, measured));
  EXPECT_EQ(profile.at("of"), "model_decode");
  EXPECT_EQ(profile.at("ops").at(0).at("launches"), 6);
  EXPECT_NEAR(profile.at("ops").at(0).at("share"), 0.75, 1e-12);
}

TEST(Bench, RowsOfTheCpuHaveNoMemoryAndOpsNoTokens) {
  const bench::Ceilings ceilings{.copy = 1e10, .matrix = 1e11};
  bench::Report report(true, Device::cpu, 2, ceilings);
  EXPECT_FALSE(nlohmann::json::parse(report.head()).contains("bf16_matrix_gflop_per_s"));
  bench::Benchmark benchmark{
      .op = "swiglu", .name = "base", .shape = "", .work = {.bytes = 1}, .prepare = {}};
  EXPECT_FALSE(nlohmann::json::parse(report.row(benchmark, {.seconds = 1, .profile = {}}))
                   .contains("tokens_per_s"));
  benchmark.tokens = 1;
  const auto row = nlohmann::json::parse(report.row(benchmark, {.seconds = 1, .profile = {}}));
  EXPECT_TRUE(row.contains("tokens_per_s"));
  EXPECT_FALSE(row.contains("peak_bytes"));
}

TEST(Bench, BuffersHoldWhatTheyAreAskedFor) {
  Context ctx(1);
  bench::Buffers buffers(ctx);
  const View normal = buffers.normal({400, 401});  // more than twice the draws that are repeated
  const float* const values = normal.as<float>();
  double square = 0;
  for (int64_t i = 0; i < normal.size(); ++i) {
    square += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    ASSERT_EQ(values[i], values[i % 65521]) << i;
  }
  EXPECT_NEAR(square / static_cast<double>(normal.size()), 1, 0.05);
  const View range = buffers.range(3);
  EXPECT_EQ(range.as<int32_t>()[2], 2);
  const View integers = buffers.integers({2, 50}, 5, 7);
  EXPECT_EQ(integers.shape(), "(2, 50)");
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(integers.as<int32_t>()[i] == 5 || integers.as<int32_t>()[i] == 6) << i;
  }
  EXPECT_EQ(buffers.bytes(), 400 * 401 * 4 + 3 * 4 + 100 * 4);
}

TEST(Bench, AProfileIsOfTheGpu) {
  Context ctx(1);
  EXPECT_FALSE(profiling(ctx));
  EXPECT_EQ(testing::input_error_of([&] { start_profile(ctx); }),
            "a profile can be taken on the GPU only");
  EXPECT_EQ(testing::error_of([&] { finish_profile(ctx); }), "there is no profile to finish");
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
  EXPECT_EQ(run_program({"bench", "--device", "tpu"}).exit_code, 2);
  const auto type = run_program({"bench", "--device", "cpu", "--dtype", "bf16"});
  EXPECT_EQ(type.exit_code, 2);
  EXPECT_NE(type.err.find("leave --dtype bf16 out"), std::string::npos) << type.err;
  const auto profile = run_program({"bench", "model", "--device", "cpu", "--profile"});
  EXPECT_EQ(profile.exit_code, 2);
  EXPECT_NE(profile.err.find("--profile is for the GPU"), std::string::npos) << profile.err;
}

}  // namespace
}  // namespace mamba3
