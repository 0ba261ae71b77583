#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "bench/model.h"
#include "bench/ops.h"
#include "bench/report.h"
#include "cli/commands.h"
#include "core/error.h"

namespace mamba3::cli {

namespace {

using bench::Benchmark;

struct BenchFlags {
  std::vector<std::string> ops;
  bool json = false;
  bench::Timing timing;
  int threads = 0;
  std::string device = "auto", dtype = "auto";
};

void print(const std::string& text) {
  fmt::print("{}", text);
  std::fflush(stdout);
}

std::vector<std::string> names_of(const std::vector<Benchmark>& benchmarks) {
  std::vector<std::string> names{"ceiling"};
  for (const Benchmark& benchmark : benchmarks) {
    if (benchmark.op != names.back()) names.push_back(benchmark.op);
  }
  return names;
}

// The rows of the ops that were asked for, or the base row of each.
std::vector<Benchmark> choose(const std::vector<Benchmark>& all,
                              const std::vector<std::string>& ops) {
  const std::vector<std::string> names = names_of(all);
  for (const std::string& op : ops) {
    if (std::find(names.begin(), names.end(), op) == names.end()) {
      input_error("[bench] there is no op '{}'; the ops are {}", op, fmt::join(names, ", "));
    }
  }
  std::vector<Benchmark> chosen;
  std::copy_if(all.begin(), all.end(), std::back_inserter(chosen), [&](const Benchmark& b) {
    return ops.empty() ? b.name == "base" : std::find(ops.begin(), ops.end(), b.op) != ops.end();
  });
  return chosen;
}

void measure(const BenchFlags& flags, Device device, const bench::Timing& timing,
             std::vector<Benchmark> benchmarks) {
  Context ctx(flags.threads, device);
  bench::Report report(flags.json, device, ctx.threads.size(),
                       bench::measure_ceilings(ctx, flags.timing));
  print(report.head());
  for (Benchmark& benchmark : benchmarks) {
    const bench::Measurement measured = bench::measure(ctx, benchmark, timing);
    print(report.row(benchmark, measured));
    if (timing.profile) print(report.profile(benchmark, measured));
    benchmark.prepare = nullptr;  // lets go of its model
  }
}

void bench_ops(const BenchFlags& flags) {
  const Placement placement = parse_placement(flags.device, flags.dtype);
  measure(flags, placement.device, flags.timing,
          choose(bench::op_benchmarks(placement), flags.ops));
}

struct ModelFlags {
  bench::ModelSettings settings{.config = {}, .name = "187m-siso"};
  std::string dtype = "bf16";
  bool profile = false;
};

void bench_model(const BenchFlags& flags, const ModelFlags& model) {
  bench::ModelSettings settings = model.settings;
  settings.config = published_config(settings.name);
  settings.dtype = model.dtype == "f32" ? DType::f32 : DType::bf16;
  settings.threads = flags.threads;
  settings.device = parse_placement(flags.device, "auto").device;
  if (model.profile && settings.device == Device::cpu) {
    input_error("[bench model] --profile is for the GPU: it needs --device cuda");
  }
  bench::Timing timing = flags.timing;
  timing.fewest_runs = 3;  // a run may take many seconds
  timing.profile = model.profile;
  measure(flags, settings.device, timing, bench::model_benchmarks(settings));
}

void add_model(CLI::App& bench, const std::shared_ptr<BenchFlags>& flags) {
  const auto model_flags = std::make_shared<ModelFlags>();
  bench::ModelSettings& settings = model_flags->settings;
  CLI::App* model =
      bench.add_subcommand("model", "Time a whole model of a published size with random weights");
  model->fallthrough();  // --json, --min-time, --threads and --device are those of bench
  model->add_option("--size", settings.name, "187m, 443m, 893m or 1.5b, then -siso or -mimo")
      ->capture_default_str();
  model
      ->add_option("--mode", settings.modes,
                   "prefill, decode and train, separated by commas: a prompt, one token after it, "
                   "an update of the optimiser")
      ->delimiter(',')
      ->capture_default_str();
  model
      ->add_option("--dtype", model_flags->dtype,
                   "Of the weights, and on the GPU of the activations; on the CPU training is in "
                   "f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  model->add_option("--tokens", settings.tokens, "Tokens of a prompt or training sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  model->add_option("--batch", settings.batch, "Sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  model
      ->add_option("--state-dtype", settings.state_dtype,
                   "Of the recurrent state; bf16 halves it, on the GPU only")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
  model->add_flag("--profile", model_flags->profile,
                  "After each row, the share of the GPU's time that each op takes");
  model->callback([flags, model_flags] { bench_model(*flags, *model_flags); });
}

}  // namespace

void add_bench(CLI::App& app) {
  const auto flags = std::make_shared<BenchFlags>();
  CLI::App* bench = app.add_subcommand(
      "bench", "Time the ops, as fractions of what this machine can copy and multiply");
  bench
      ->add_option("-o,--op", flags->ops,
                   "All cases of these ops, separated by commas; without it the base case of "
                   "every op. 'ceiling': the ceilings alone")
      ->delimiter(',');
  bench->add_flag("--json", flags->json, "A JSON object a line instead of a table");
  bench->add_option("--min-time", flags->timing.min_time, "Seconds of measurement for each row")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  bench->add_option("--threads", flags->threads, "Threads; 0: as many as the process may use")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  bench->add_option("--device", flags->device, "cpu, cuda, or auto: the GPU if there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  bench
      ->add_option("--dtype", flags->dtype,
                   "Of activations and weights of the ops on the GPU: f32, bf16, or auto, bf16")
      ->check(CLI::IsMember({"auto", "f32", "bf16"}))
      ->capture_default_str();
  add_model(*bench, flags);
  bench->callback([flags, bench] {
    if (bench->get_subcommands().empty()) bench_ops(*flags);
  });
}

}  // namespace mamba3::cli
