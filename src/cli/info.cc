// mamba3 info: what a model is.

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/model_options.h"
#include "mamba3/model.h"

namespace mamba3::cli {

namespace {

using Json = nlohmann::ordered_json;

struct Options {
  ModelOptions model;
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

std::string architecture(const ModelInfo& i) {
  std::string text = fmt::format(
      "Mamba-3 {}, {} layers of width D = {}, {}", i.mimo ? "MIMO" : "SISO", i.layers, i.width,
      i.mlp_width > 0 ? fmt::format("MLP width {}", i.mlp_width) : std::string("no MLP"));
  if (!i.attention_layers.empty()) {
    text += fmt::format("; attention in layers {}", fmt::join(i.attention_layers, ", "));
  }
  return text;
}

void print_text(const Model& model) {
  const ModelInfo& i = model.info();
  const auto line = [](std::string_view name, std::string_view value) {
    fmt::print("{:<13} {}\n", name, value);
  };
  line("architecture", architecture(i));
  line("mixer", fmt::format("{} heads of {} (H, P), state size N = {}, {} group{} (G), rank R = "
                            "{}, {} rotary angles (S){}",
                            i.heads, i.head_dim, i.state_size, i.groups, i.groups == 1 ? "" : "s",
                            i.mimo_rank, i.rotary_angles, i.out_norm ? ", output norm" : ""));
  line("decay", fmt::format("{}: {}", i.decay, i.decay_reason));
  line("vocabulary", fmt::format("{} ids in {} rows, head {}", i.vocab, i.vocab_padded,
                                 i.tied ? "tied to the embedding" : "of its own"));
  line("parameters", with_commas(i.parameters));
  line("weights", fmt::format("{} ({} bytes), {}, {} layout", binary_size(i.weight_bytes),
                              with_commas(i.weight_bytes), i.weight_dtype, i.layout));
  std::string state = fmt::format("{} ({} bytes) per sequence", binary_size(i.state_bytes),
                                  with_commas(i.state_bytes));
  if (i.state_bytes_per_token > 0) {
    state +=
        fmt::format(", and {} bytes per token for attention", with_commas(i.state_bytes_per_token));
  }
  line("state", state);
  line("tokenizer", model.has_tokenizer() ? model.tokenizer().description()
                                          : "none: the folder has no tokenizer.json");
}

void run(Options& options) {
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
  CLI::App* command = app.add_subcommand("info", "Describe a model");
  const auto options = std::make_shared<Options>();
  add_model_options(*command, options->model);
  add_tokenizer_option(*command, options->model);
  command->add_flag("--json", options->json, "Print a JSON object");
  command->callback([options] { run(*options); });
}

}  // namespace mamba3::cli
