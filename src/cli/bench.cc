#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "bench/model.h"
#include "bench/ops.h"
#include "cli/commands.h"
#include "core/error.h"

namespace mamba3::cli {

namespace {

using bench::Benchmark;
using bench::Ceilings;

struct BenchFlags {
  std::vector<std::string> ops;
  bool json = false;
  bench::Timing timing;
  int threads = 0;
};

std::string readable_time(double seconds) {
  if (seconds < 1e-3) return fmt::format("{:.2f} us", seconds * 1e6);
  if (seconds < 1) return fmt::format("{:.2f} ms", seconds * 1e3);
  return fmt::format("{:.3f} s", seconds);
}

// Prints rows as they are measured: a table for people, or a JSON object a line.
class Report {
 public:
  Report(bool json, int threads, const Ceilings& ceilings) : json_(json), ceilings_(ceilings) {
    if (json_) {
      print({{"op", "ceiling"},
             {"threads", threads},
             {"copy_gb_per_s", ceilings.copy * 1e-9},
             {"matrix_gflop_per_s", ceilings.matrix * 1e-9}});
      return;
    }
    fmt::print("{} threads; ceilings: copy {:.1f} GB/s, f32 matrix product {:.1f} GFLOP/s\n",
               threads, ceilings.copy * 1e-9, ceilings.matrix * 1e-9);
    std::fflush(stdout);
  }

  void row(const Benchmark& benchmark, double seconds) {
    const double bytes = benchmark.work.bytes / seconds, flops = benchmark.work.flops / seconds;
    if (json_) {
      print({{"op", benchmark.op},
             {"case", benchmark.name},
             {"shape", benchmark.shape},
             {"median_s", seconds},
             {"gb_per_s", bytes * 1e-9},
             {"gflop_per_s", flops * 1e-9},
             {"copy_fraction", bytes / ceilings_.copy},
             {"matrix_fraction", flops / ceilings_.matrix}});
      return;
    }
    if (!header_) {
      fmt::print("{:<20} {:<22} {:<38} {:>10} {:>7} {:>7} {:>8} {:>9}\n", "op", "case", "shape",
                 "median", "GB/s", "of copy", "GFLOP/s", "of matrix");
      header_ = true;
    }
    fmt::print("{:<20} {:<22} {:<38} {:>10} {:>7.1f} {:>6.0f}% {:>8} {:>9}\n", benchmark.op,
               benchmark.name, benchmark.shape, readable_time(seconds), bytes * 1e-9,
               100 * bytes / ceilings_.copy, flops > 0 ? fmt::format("{:.1f}", flops * 1e-9) : "",
               flops > 0 ? fmt::format("{:.0f}%", 100 * flops / ceilings_.matrix) : "");
    std::fflush(stdout);
  }

 private:
  static void print(const nlohmann::ordered_json& line) {
    fmt::print("{}\n", line.dump());
    std::fflush(stdout);
  }

  bool json_;
  bool header_ = false;
  Ceilings ceilings_;
};

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

void measure(const BenchFlags& flags, const bench::Timing& timing,
             const std::vector<Benchmark>& benchmarks) {
  Context ctx(flags.threads);
  Report report(flags.json, ctx.threads.size(), bench::measure_ceilings(ctx, flags.timing));
  for (const Benchmark& benchmark : benchmarks) {
    report.row(benchmark, bench::median_seconds(ctx, benchmark, timing));
  }
}

void bench_ops(const BenchFlags& flags) {
  measure(flags, flags.timing, choose(bench::op_benchmarks(), flags.ops));
}

struct ModelFlags {
  bench::ModelSettings settings{.config = {}, .name = "187m-siso"};
  std::string dtype = "bf16";
};

void bench_model(const BenchFlags& flags, const ModelFlags& model) {
  bench::ModelSettings settings = model.settings;
  settings.config = published_config(settings.name);
  settings.dtype = model.dtype == "f32" ? DType::f32 : DType::bf16;
  settings.threads = flags.threads;
  bench::Timing timing = flags.timing;
  timing.fewest_runs = 3;  // a run may take many seconds
  measure(flags, timing, bench::model_benchmarks(settings));
}

void add_model(CLI::App& bench, const std::shared_ptr<BenchFlags>& flags) {
  const auto model_flags = std::make_shared<ModelFlags>();
  bench::ModelSettings& settings = model_flags->settings;
  CLI::App* model =
      bench.add_subcommand("model", "Time a whole model of a published size with random weights");
  model->fallthrough();  // --json, --min-time and --threads are those of bench
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
                   "Of the weights of prefill and decode; training is in f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  model->add_option("--tokens", settings.tokens, "Tokens of a prompt or training sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  model->add_option("--batch", settings.batch, "Sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
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
  add_model(*bench, flags);
  bench->callback([flags, bench] {
    if (bench->get_subcommands().empty()) bench_ops(*flags);
  });
}

}  // namespace mamba3::cli
