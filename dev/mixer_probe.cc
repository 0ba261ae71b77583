// The mixer by itself, as dev/compare_reference.py wants it: from tensors in a file to results
// in a file, or timed at a shape of the caller's choice.

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "core/error.h"
#include "core/graph.h"
#include "core/memory.h"
#include "formats/safetensors.h"
#include "model/copy_converted.h"
#include "model/tensors.h"
#include "ops/linear.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"

namespace mamba3 {

namespace {

using bench::Benchmark;
using bench::Buffers;
using bench::Call;

using Make = std::function<View(const std::string& name, std::initializer_list<int64_t> dims)>;

MixerParams make_params(const MixerShape& s, const Make& make) {
  const auto ranks = [&](const std::string& name) {
    return s.mimo ? make(name, {s.H, s.R, s.P}) : View{};
  };
  return {.dt_bias = make("dt_bias", {s.H}),
          .A_log = {},
          .B_bias = make("B_bias", {s.H, s.R, s.N}),
          .C_bias = make("C_bias", {s.H, s.R, s.N}),
          .B_norm = make("B_norm", {s.N}),
          .C_norm = make("C_norm", {s.N}),
          .D = make("D", {s.H}),
          .mimo_x = ranks("mimo_x"),
          .mimo_z = ranks("mimo_z"),
          .mimo_o = ranks("mimo_o"),
          .norm = {}};
}

// The start of as many sequences.
MixerState make_state(Buffers& buffers, const MixerShape& s, int64_t sequences) {
  return {.angle = buffers.zeros({sequences, s.H, s.S}),
          .ssm = buffers.zeros({sequences, s.H, s.P, s.N}),
          .k_prev = buffers.zeros({sequences, s.R, s.H, s.N}),
          .v_prev = buffers.zeros({sequences, s.H, s.P}),
          .rows = buffers.range(sequences)};
}

// ---- From file to file ----

// A row of proj says how many groups and angles there are: it has 2 R G N + S elements besides
// those of z, x and the heads, and S is at most N/2. It is MIMO if there is a mimo_x.
MixerShape shape_of(const TensorFile& file) {
  const View &proj = file.at("proj"), &B_bias = file.at("B_bias"), &d_y = file.at("d_y");
  if (proj.rank != 3 || B_bias.rank != 3 || d_y.rank != 3 || B_bias.size() == 0) {
    input_error("proj is {}, B_bias {} and d_y {}, want (B, T, d_proj), (H, R, N) and (B, T, H P)",
                proj.shape(), B_bias.shape(), d_y.shape());
  }
  MixerShape s{.H = B_bias.dim(0), .P = d_y.dim(2) / B_bias.dim(0), .N = B_bias.dim(2), .G = 0};
  s.R = B_bias.dim(1);
  s.mimo = std::ranges::any_of(file.tensors, [](const auto& t) { return t.name == "mimo_x"; });
  if (s.mimo) s.rope_pairs = RopePairs::halves;
  const int64_t rest = proj.dim(2) - s.d_proj(), row = 2 * s.R * s.N;
  s.G = rest / row;
  s.S = rest % row;
  return s;
}

struct ComputeFlags {
  std::string input, output, device = "auto";
};

void compute(const ComputeFlags& flags) {
  const TensorFile file = read_safetensors(flags.input);
  const MixerShape s = shape_of(file);
  const int64_t B = file.at("proj").dim(0), T = file.at("proj").dim(1);
  Context ctx(0, parse_placement(flags.device, "auto").device);
  const DType act = ctx.device == Device::cuda ? file.at("proj").dtype : DType::f32;
  Buffers buffers(ctx);
  const auto load_as = [&](DType dtype) -> Make {
    return [&, dtype](const std::string& name, std::initializer_list<int64_t> dims) {
      const View &stored = file.at(name), view = buffers.zeros(dims, dtype);
      if (stored.shape() != view.shape()) {
        input_error("{}: {} is {}, want {}", flags.input, name, stored.shape(), view.shape());
      }
      copy_converted(ctx, stored, view);
      return view;
    };
  };
  NamedTensors results;
  const auto result = [&](const std::string& name, const View& view) {
    results.add(name, view);
    return view;
  };

  const MixerParams params = make_params(s, load_as(DType::f32));
  const View proj = load_as(act)("proj", {B, T, s.d_proj()});
  const MixerState state = make_state(buffers, s, B);
  mixer_scan(ctx, {.shape = s,
                   .params = params,
                   .proj = proj,
                   .y = result("y", buffers.zeros({B, T, s.d_inner()}, act)),
                   .state = state});
  result("angle", state.angle);
  result("ssm", state.ssm);
  result("k_prev", state.k_prev);
  result("v_prev", state.v_prev);
  mixer_scan_backward(ctx, {.shape = s,
                            .params = params,
                            .proj = proj,
                            .d_y = load_as(act)("d_y", {B, T, s.d_inner()}),
                            .d_proj = result("d_proj", buffers.zeros({B, T, s.d_proj()}, act)),
                            .d_params = make_params(s, [&](const std::string& name, auto dims) {
                              return result("d_" + name, buffers.zeros(dims));
                            })});

  const NamedTensors host = copy_to_host(ctx, results);
  std::vector<NamedView> views;
  for (const std::string& name : host.names()) views.push_back({name, host.at(name)});
  write_safetensors(flags.output, views);
}

// ---- Timed ----

struct TimeFlags {
  std::string work = "scan", device = "auto";
  int64_t batch = 1, tokens = 2048;
  MixerShape shape{.H = 64, .P = 64, .N = 128, .S = 32};
  bool states = false;
  bench::Timing timing;
};

// What is timed runs in activations of this type.
DType act_of(Device device) {
  return device == Device::cuda ? DType::bf16 : DType::f32;
}

MixerParams random_params(Buffers& buffers, const MixerShape& s) {
  return make_params(s, [&](const std::string&, auto dims) { return buffers.normal(dims); });
}

MixerParams zero_params(Buffers& buffers, const MixerShape& s) {
  return make_params(s, [&](const std::string&, auto dims) { return buffers.zeros(dims); });
}

// A prompt, to its final state.
Call prepare_scan(Buffers& buffers, const TimeFlags& flags, DType act) {
  const MixerShape& s = flags.shape;
  const MixerScanArgs args{.shape = s,
                           .params = random_params(buffers, s),
                           .proj = buffers.normal({flags.batch, flags.tokens, s.d_proj()}, act),
                           .y = buffers.zeros({flags.batch, flags.tokens, s.d_inner()}, act),
                           .state = make_state(buffers, s, flags.batch)};
  return [args](Context& ctx) { mixer_scan(ctx, args); };
}

struct Training {
  MixerScanArgs forward;
  MixerScanBackwardArgs backward;
};

Training training(Buffers& buffers, const TimeFlags& flags, DType act) {
  const MixerShape& s = flags.shape;
  const int64_t B = flags.batch, T = flags.tokens;
  const auto state = [&] { return flags.states ? make_state(buffers, s, B) : MixerState{}; };
  const MixerScanArgs forward{.shape = s,
                              .params = random_params(buffers, s),
                              .proj = buffers.normal({B, T, s.d_proj()}, act),
                              .y = buffers.zeros({B, T, s.d_inner()}, act),
                              .state = state()};
  return {forward,
          {.shape = s,
           .params = forward.params,
           .proj = forward.proj,
           .initial = state(),
           .d_y = buffers.normal({B, T, s.d_inner()}, act),
           .d_proj = buffers.zeros({B, T, s.d_proj()}, act),
           .d_params = zero_params(buffers, s),
           .d_state = state()}};
}

Call prepare_train(Buffers& buffers, const TimeFlags& flags, DType act) {
  const Training scan = training(buffers, flags, act);
  return [scan](Context& ctx) {
    mixer_scan(ctx, scan.forward);
    mixer_scan_backward(ctx, scan.backward);
  };
}

// Forward and backward of the layer of twice as many channels inside: in_proj, scan, out_proj.
Call prepare_layer(Buffers& buffers, const TimeFlags& flags, DType act) {
  const Training scan = training(buffers, flags, act);
  const int64_t rows = flags.batch * flags.tokens, inner = flags.shape.d_inner(), D = inner / 2;
  const int64_t d_proj = flags.shape.d_proj();
  const LinearArgs in_proj{.x = buffers.normal({rows, D}, act),
                           .weight = buffers.normal({d_proj, D}, act),
                           .y = scan.forward.proj.reshape({rows, d_proj})};
  const LinearArgs out_proj{.x = scan.forward.y.reshape({rows, inner}),
                            .weight = buffers.normal({D, inner}, act),
                            .y = buffers.zeros({rows, D}, act)};
  const LinearBackwardArgs d_out_proj{.x = out_proj.x,
                                      .weight = out_proj.weight,
                                      .d_y = buffers.normal({rows, D}, act),
                                      .d_x = scan.backward.d_y.reshape({rows, inner}),
                                      .d_weight = buffers.zeros({D, inner})};
  const LinearBackwardArgs d_in_proj{.x = in_proj.x,
                                     .weight = in_proj.weight,
                                     .d_y = scan.backward.d_proj.reshape({rows, d_proj}),
                                     .d_x = buffers.zeros({rows, D}, act),
                                     .d_weight = buffers.zeros({d_proj, D})};
  return [=](Context& ctx) {
    linear(ctx, in_proj);
    mixer_scan(ctx, scan.forward);
    linear(ctx, out_proj);
    linear_backward(ctx, d_out_proj);
    mixer_scan_backward(ctx, scan.backward);
    linear_backward(ctx, d_in_proj);
  };
}

// The states of so many steps do not fit the largest L2 there is, so that each comes from memory.
int64_t steps_of_a_call(const TimeFlags& flags) {
  const MixerShape& s = flags.shape;
  const int64_t state_bytes = flags.batch * s.H * s.P * s.N * size_of(DType::f32);
  return std::clamp<int64_t>((int64_t{512} << 20) / state_bytes, 2, 256);
}

// Steps of different sequences, recorded as a graph, as decoding runs them.
Call prepare_steps(Buffers& buffers, const TimeFlags& flags, DType act) {
  const MixerShape& s = flags.shape;
  const MixerParams params = random_params(buffers, s);
  std::vector<MixerStepArgs> steps;
  for (int64_t i = 0; i < steps_of_a_call(flags); ++i) {
    steps.push_back({.shape = s,
                     .params = params,
                     .proj = buffers.normal({flags.batch, s.d_proj()}, act),
                     .y = buffers.zeros({flags.batch, s.d_inner()}, act),
                     .state = make_state(buffers, s, flags.batch)});
  }
  return [steps, graph = std::make_shared<Graph>()](Context& ctx) {
    graph->run(ctx, [&] {
      for (const MixerStepArgs& step : steps) mixer_step(ctx, step);
    });
  };
}

// Of one call, with its arguments and once scratch has its size.
int64_t peak_bytes(Device device, const Benchmark& benchmark) {
  Context ctx(0, device);
  Buffers buffers(ctx);
  const bench::Prepared prepared = benchmark.prepare(buffers);
  prepared.call(ctx);
  synchronize(ctx);
  cuda::reset_peak_bytes();
  prepared.call(ctx);
  synchronize(ctx);
  return cuda::peak_bytes();
}

void time(TimeFlags flags) {
  const Device device = parse_placement(flags.device, "auto").device;
  if (flags.shape.R > 1) {
    flags.shape.mimo = true;
    flags.shape.rope_pairs = RopePairs::halves;
  }
  const bool steps = flags.work == "step";
  const auto prepare = steps                   ? prepare_steps
                       : flags.work == "layer" ? prepare_layer
                       : flags.work == "train" ? prepare_train
                                               : prepare_scan;
  Benchmark benchmark;
  benchmark.prepare = [&](Buffers& buffers) { return prepare(buffers, flags, act_of(device)); };
  if (steps) benchmark.copies = 1;  // a call has many already
  const double seconds = [&] {
    Context ctx(0, device);  // and its scratch, which are not there when the peak is measured
    return bench::measure(ctx, benchmark, flags.timing).seconds;
  }();
  fmt::print("{{\"seconds\": {:.4e}, \"peak_bytes\": {}}}\n",
             steps ? seconds / static_cast<double>(steps_of_a_call(flags)) : seconds,
             steps || device == Device::cpu ? 0 : peak_bytes(device, benchmark));
}

// ---- The program ----

void add_device(CLI::App& command, std::string& device) {
  command.add_option("--device", device, "cpu (in f32), cuda, or auto: the GPU if there is one");
}

int run(int argc, char** argv) {
  CLI::App app("The mixer between in_proj and out_proj by itself", "mixer_probe");
  app.require_subcommand(1);

  ComputeFlags compute_flags;
  CLI::App* command = app.add_subcommand(
      "compute", "Forward and backward of given tensors: results, final states and gradients");
  command
      ->add_option("input", compute_flags.input,
                   "Safetensors: proj, d_y, dt_bias, B_bias, C_bias, B_norm, C_norm, D; of MIMO "
                   "mimo_x, mimo_z, mimo_o")
      ->required();
  command
      ->add_option("output", compute_flags.output,
                   "Safetensors: y, angle, ssm, k_prev, v_prev, d_proj and d_ of the parameters")
      ->required();
  add_device(*command, compute_flags.device);
  command->callback([&] { compute(compute_flags); });

  TimeFlags time_flags;
  MixerShape& shape = time_flags.shape;
  command = app.add_subcommand("time", "Time one shape, as a line of JSON");
  command->option_defaults()->always_capture_default();
  command
      ->add_option("--work", time_flags.work,
                   "scan: a prompt; train: scan and its backward; layer: the same with in_proj and "
                   "out_proj; step: one token")
      ->check(CLI::IsMember({"scan", "train", "layer", "step"}));
  command->add_option("--batch", time_flags.batch)->check(CLI::PositiveNumber);
  command->add_option("--tokens", time_flags.tokens, "Of a sequence")->check(CLI::PositiveNumber);
  command->add_option("--heads", shape.H)->check(CLI::PositiveNumber);
  command->add_option("--head-dim", shape.P)->check(CLI::PositiveNumber);
  command->add_option("--state-size", shape.N)->check(CLI::PositiveNumber);
  command->add_option("--groups", shape.G)->check(CLI::PositiveNumber);
  command->add_option("--rank", shape.R, "More than 1: MIMO")->check(CLI::PositiveNumber);
  command->add_option("--angles", shape.S)->check(CLI::NonNegativeNumber);
  command->add_flag("--states", time_flags.states,
                    "Of train and layer: sequences go on from states, which have gradients");
  command->add_option("--min-time", time_flags.timing.min_time, "Seconds of measurement")
      ->check(CLI::PositiveNumber);
  add_device(*command, time_flags.device);
  command->callback([&] { time(time_flags); });

  try {
    app.parse(argc, argv);  // runs the command's callback
  } catch (const CLI::Success& request) {
    return app.exit(request);  // --help
  }
  return 0;
}

}  // namespace

}  // namespace mamba3

int main(int argc, char** argv) {
  try {
    return mamba3::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "mixer_probe: {}\n", error.what());
    return 1;
  }
}
