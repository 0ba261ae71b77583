// mamba3 info: what a model is, and what the GPU is.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "core/error.h"
#include "core/gpu_info.h"
#include "mamba3/model.h"

namespace mamba3::cli {

namespace {

using Json = nlohmann::ordered_json;

struct Options {
  ModelOptions model;
  bool device = false;
  bool json = false;
};

std::string binary_size(int64_t bytes) {
  constexpr std::string_view kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  auto value = static_cast<double>(bytes);
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return fmt::format("{:.{}f} {}", value, unit == 0 ? 0 : 1, kUnits[unit]);
}

std::string with_commas(int64_t count) {
  std::string digits = std::to_string(count);
  for (auto i = static_cast<int64_t>(digits.size()) - 3; i > 0; i -= 3)
    digits.insert(static_cast<size_t>(i), ",");
  return digits;
}

Json to_json(const Model& model) {
  const ModelInfo& i = model.info();
  return {{"layout", i.layout},
          {"layers", i.layers},
          {"layer_kinds", i.layer_kinds},
          {"attention_layers", i.attention_layers},
          {"width", i.width},
          {"mlp_width", i.mlp_width},
          {"heads", i.heads},
          {"head_dim", i.head_dim},
          {"state_size", i.state_size},
          {"groups", i.groups},
          {"mimo", i.mimo},
          {"mimo_rank", i.mimo_rank},
          {"rotary_angles", i.rotary_angles},
          {"out_norm", i.out_norm},
          {"decay", i.decay},
          {"decay_reason", i.decay_reason},
          {"vocab", i.vocab},
          {"vocab_padded", i.vocab_padded},
          {"tied", i.tied},
          {"parameters", i.parameters},
          {"weight_dtype", i.weight_dtype},
          {"weight_bytes", i.weight_bytes},
          {"state_bytes", i.state_bytes},
          {"state_bytes_per_token", i.state_bytes_per_token},
          {"tokenizer", model.has_tokenizer() ? Json(model.tokenizer().description()) : Json()},
          {"warnings", i.warnings}};
}

// The name of the kind of layer for people.
std::string title(const ModelInfo& i, std::string_view kind) {
  if (kind == "mamba3") return i.mimo ? "Mamba-3 MIMO" : "Mamba-3 SISO";
  if (kind == "mamba2") return "Mamba-2";
  return kind == "gated_deltanet" ? "Gated DeltaNet" : "attention";
}

// The most frequent kind of layer comes first; of the others the numbers of their layers are
// listed.
std::string architecture(const ModelInfo& i) {
  std::map<std::string, std::vector<size_t>> layers_of;
  for (size_t layer = 0; layer < i.layer_kinds.size(); ++layer) {
    layers_of[i.layer_kinds[layer]].push_back(layer);
  }
  const auto main = std::max_element(
      layers_of.begin(), layers_of.end(),
      [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
  std::string text = fmt::format(
      "{}, {} layers of width D = {}, {}", title(i, main->first), i.layers, i.width,
      i.mlp_width > 0 ? fmt::format("MLP width {}", i.mlp_width) : std::string("no MLP"));
  for (const auto& [kind, layers] : layers_of) {
    if (kind == main->first) continue;
    text += fmt::format("; {} in layers {}", title(i, kind), fmt::join(layers, ", "));
  }
  return text;
}

void print_line(std::string_view name, std::string_view value) {
  fmt::print("{:<13} {}\n", name, value);
}

void print_text(const Model& model) {
  const ModelInfo& i = model.info();
  print_line("architecture", architecture(i));
  print_line("mixer",
             fmt::format("{} heads of {} (H, P), state size N = {}, {} group{} (G), rank R = "
                         "{}, {} rotary angles (S){}",
                         i.heads, i.head_dim, i.state_size, i.groups, i.groups == 1 ? "" : "s",
                         i.mimo_rank, i.rotary_angles, i.out_norm ? ", output norm" : ""));
  if (!i.decay.empty()) print_line("decay", fmt::format("{}: {}", i.decay, i.decay_reason));
  print_line("vocabulary", fmt::format("{} ids in {} rows, head {}", i.vocab, i.vocab_padded,
                                       i.tied ? "tied to the embedding" : "of its own"));
  print_line("parameters", with_commas(i.parameters));
  print_line("weights", fmt::format("{} ({} bytes), {}, {} layout", binary_size(i.weight_bytes),
                                    with_commas(i.weight_bytes), i.weight_dtype, i.layout));
  std::string state = fmt::format("{} ({} bytes) per sequence", binary_size(i.state_bytes),
                                  with_commas(i.state_bytes));
  if (i.state_bytes_per_token > 0) {
    state +=
        fmt::format(", and {} bytes per token for attention", with_commas(i.state_bytes_per_token));
  }
  print_line("state", state);
  print_line("tokenizer", model.has_tokenizer() ? model.tokenizer().description()
                                                : "none: the folder has no tokenizer.json");
}

// What docs/kernels.md says that this card gets.
void print_device(bool json) {
  const GpuInfo gpu = cuda::gpu_info();
  const std::string scan = fmt::format(
      "tensor cores ({}) for bf16, SISO or rank 2, 4, 8, N 64 or 128, 64 | P; else CUDA cores",
      gpu.hopper_products ? "wgmma" : "mma.sync");
  const std::string backward = fmt::format(
      "the same by mma.sync, without out_norm and states{}",
      gpu.all_backward_tiles ? "" : "; N 128 with rope_fraction 1 or rank 8 on CUDA cores");
  const char* const step = gpu.overlap ? "kernels overlap; small batches split a head in a cluster"
                                       : "one kernel after the other";
  const char* const loss = gpu.hopper_products
                               ? "wgmma with the exponentials in its epilogue (bf16)"
                               : "cuBLASLt, then a pass over the logits";
  if (json) {
    fmt::print("{}\n", Json{{"name", gpu.name},
                            {"compute_capability", fmt::format("{}.{}", gpu.major, gpu.minor)},
                            {"multiprocessors", gpu.multiprocessors},
                            {"memory_bytes", gpu.memory},
                            {"shared_memory_bytes", gpu.shared_memory},
                            {"scan", scan},
                            {"scan_backward", backward},
                            {"decode", step},
                            {"loss", loss}}
                           .dump(2));
    return;
  }
  print_line("GPU",
             fmt::format("{}, compute capability {}.{}, {} multiprocessors, {}, {} of shared "
                         "memory for a block",
                         gpu.name, gpu.major, gpu.minor, gpu.multiprocessors,
                         binary_size(gpu.memory), binary_size(gpu.shared_memory)));
  print_line("scan", scan);
  print_line("its backward", backward);
  print_line("decode", step);
  print_line("loss", loss);
}

void run(Options& options) {
  if (options.device) return print_device(options.json);
  if (options.model.folder.empty()) {
    input_error("name a model by -m FOLDER, or ask for the GPU by --device");
  }
  options.model.device = "cpu";  // nothing is computed
  const Model model = load_model(options.model);
  if (options.json) {
    fmt::print("{}\n", to_json(model).dump(2));
  } else {
    print_text(model);
  }
}

}  // namespace

void add_info(CLI::App& app) {
  CLI::App* command = app.add_subcommand("info", "Describe a model or the GPU");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  command->get_option("--model")->required(false);
  add_tokenizer_option(*command, options->model);
  command->add_flag("--device", options->device,
                    "Describe the GPU, and which kernels it gets, instead of a model");
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
