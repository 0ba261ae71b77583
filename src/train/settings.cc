#include "train/settings.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "formats/text_file.h"

namespace mamba3 {

namespace {

using nlohmann::ordered_json;

// Embedding rows are a multiple of this, as in the published models.
constexpr int64_t kVocabMultiple = 16;

ordered_json json_of(const TrainSettings& settings) {
  ordered_json json;
  visit_settings(settings,
                 [&](const SettingInfo& info, const auto& member) { json[info.name] = member; });
  return json;
}

TrainSettings settings_of(const ordered_json& json) {
  if (!json.is_object()) input_error("the training settings must be a JSON object");
  TrainSettings settings;
  size_t known = 0;
  visit_settings(settings, [&](const SettingInfo& info, auto& member) {
    if (!json.contains(info.name)) return;
    json[info.name].get_to(member);
    ++known;
  });
  if (known != json.size())
    input_error("there are training settings that this version does not know");
  return settings;
}

void at_least(const char* flag, int64_t value, int64_t low) {
  if (value < low) input_error("--{} must be at least {}, got {}", flag, low, value);
}

// The kinds of the layers: --mixer, repeated over the layers.
void add_layers(const TrainSettings& s, ordered_json& json) {
  if (s.mixer.empty()) input_error("--mixer must name at least one kind of layer");
  ordered_json names = ordered_json::array(), attention = ordered_json::array();
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    const LayerKind kind = parse_layer_kind(s.mixer[static_cast<size_t>(layer) % s.mixer.size()]);
    if (kind == LayerKind::attention) attention.push_back(layer);
    names.push_back(official_name_of(kind));
  }
  json["ssm_cfg"]["layers"] = names;
  json["attn_layer_idx"] = attention;
  json["attn_cfg"] = {
      {"causal", true},
      {"num_heads", s.attention_heads},
      {"num_heads_kv", s.attention_kv_heads > 0 ? s.attention_kv_heads : s.attention_heads},
      {"qkv_proj_bias", false},
      {"out_proj_bias", false},
      {"rotary_emb_dim", s.attention_rope}};
}

// The flags as a config.json, so that one parser says what a model may be.
std::string flags_as_config(const TrainSettings& s, int64_t vocab) {
  ordered_json json = {{"d_model", s.d_model},
                       {"d_intermediate", s.mlp},
                       {"n_layer", s.layers},
                       {"vocab_size", vocab},
                       {"pad_vocab_size_multiple", kVocabMultiple},
                       {"tie_embeddings", !s.untied},
                       {"ssm_cfg",
                        {{"layer", "Mamba3"},
                         {"d_state", s.d_state},
                         {"expand", s.expand},
                         {"headdim", s.headdim},
                         {"ngroups", s.groups},
                         {"dt_min", s.dt_min},
                         {"dt_max", s.dt_max},
                         {"rope_fraction", s.rope_fraction},
                         {"is_mimo", s.mimo},
                         {"mimo_rank", s.rank},
                         {"is_outproj_norm", s.out_norm},
                         {"rope", s.rope},
                         {"discretisation", s.discretisation},
                         {"bc_bias", !s.no_bc_bias},
                         {"external_conv", s.external_conv},
                         {"allow_neg_eigval", s.negative_eigenvalues}}}};
  add_layers(s, json);
  return json.dump();
}

}  // namespace

Schedule TrainSettings::learning_rate() const {
  return {.decay = parse_decay(schedule),
          .peak = lr,
          .floor = min_lr,
          .warmup = warmup,
          .tail = cooldown};
}

OptimizerSettings TrainSettings::optimizer() const {
  return {.beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay, .clip = clip};
}

Supervision TrainSettings::task_supervision() const {
  if (supervision == "every") return Supervision::every_position;
  if (supervision == "final") return Supervision::final_answer;
  input_error("--supervision must be every or final, got '{}'", supervision);
}

TaskOptions TrainSettings::task_measures() const {
  return {.symbols = symbols, .pairs = pairs, .copied = copied};
}

TaskSource::Options TrainSettings::task_options() const {
  return {.length = {.first = min_length, .last = max_length, .growth = growth},
          .shortest = shortest,
          .supervision = task_supervision(),
          .seed = seed,
          .validation_length = val_length,
          .validation_rows = val_rows};
}

int64_t TrainSettings::total_steps() const {
  if (minutes > 0) return 0;
  if (tokens == 0) return steps;
  const int64_t per_step = batch * context * accumulate;
  return (tokens + per_step - 1) / per_step;
}

void TrainSettings::check() const {
  if (text.empty() == task.empty()) input_error("give text files to train on, or a --task");
  if (!(held_out >= 0) || held_out >= 1) {
    input_error("--held-out must be from 0 to below 1, got {}", held_out);
  }
  if (!(minutes >= 0) || !std::isfinite(minutes)) {
    input_error("--minutes must not be negative, got {}", minutes);
  }
  if (!(target_accuracy >= 0) || target_accuracy > 1) {
    input_error("--target-accuracy must be from 0 to 1, got {}", target_accuracy);
  }
  if (!(growth_loss >= 0)) {
    input_error("--growth-loss must not be negative, got {}", growth_loss);
  }
  if (growth_loss > 0 && minutes > 0) {
    input_error("--growth-loss counts updates, so it goes with --steps, not --minutes");
  }
  at_least("steps", steps, 1);
  at_least("tokens", tokens, 0);
  if (tokens > 0 && minutes > 0) input_error("give --tokens or --minutes, not both");
  if (tokens > 0 && !task.empty()) {
    input_error(
        "--tokens goes with a text: the sequences of a task change their length, so give "
        "--steps or --minutes");
  }
  for (const auto& [flag, value] : {std::pair{"batch", batch},
                                    {"context", context},
                                    {"accumulate", accumulate},
                                    {"sample-tokens", sample_tokens}}) {
    at_least(flag, value, 1);
  }
  for (const auto& [flag, value] : {std::pair{"val-every", val_every},
                                    {"sample-every", sample_every},
                                    {"save-every", save_every},
                                    {"val-tokens", val_tokens},
                                    {"val-rows", val_rows},
                                    {"mlp", mlp}}) {
    at_least(flag, value, 0);
  }
  if (!size.empty() + !config.empty() + !init.empty() > 1) {
    input_error("--size, --config and --init each say what the model is: give one of them");
  }
  learning_rate().check();
  optimizer().check();
  task_supervision();
}

TrainSettings default_settings(std::string_view task, const std::vector<std::string>& mixer) {
  TrainSettings settings;
  if (task.empty()) return settings;
  make_task(task);
  settings.task = task;
  settings.d_model = 64;
  settings.layers = 1;
  settings.headdim = 32;
  settings.mlp = 0;
  settings.untied = true;
  settings.batch = 32;
  settings.steps = 5000;
  settings.growth = 0.6;
  settings.decay = "softplus";  // a decay near 1 is near at hand, where heavy_tail needs raw -100
  settings.lr = 2e-3;
  settings.eps = 1e-5;  // gradients vanish once the short lengths are solved; do not amplify them
  settings.weight_decay = 0.3;
  settings.val_every = 50;
  settings.target_accuracy = 1;
  if (task == "parity") return settings;
  settings.steps = 10000;
  settings.weight_decay = 0.1;
  if (task.starts_with("modular_arithmetic")) {
    settings.layers = 3;
    settings.growth = 0.8;  // long ones ask for a small learning rate, as the end of a run has
    if (task == "modular_arithmetic_brackets") {  // what is learnt is learnt from many long ones
      settings.growth = 0.4;
      settings.steps = 30000;
      settings.batch = 256;
    }
    settings.rope_fraction = 1;
    // A token turns the state of Mamba-3 by up to pi dt, and has to by multiples of 2 pi / 5: with
    // the published 0.001 to 0.1 most of a run goes into growing dt. Where dt is only a decay,
    // such steps would forget within a few tokens.
    if (std::ranges::count(mixer, "mamba3") > 0) {
      settings.dt_min = 0.5;
      settings.dt_max = 1;
    }
    settings.eps = 1e-8;
    settings.lr = 1.5e-3;
    return settings;
  }
  settings.layers = 2;  // one to join what stands side by side, one to find it again
  settings.min_length = 16;
  settings.max_length = 256;
  return settings;
}

std::string to_json(const TrainSettings& settings) {
  return json_of(settings).dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

TrainSettings parse_settings(std::string_view json) {
  try {
    return settings_of(ordered_json::parse(json));
  } catch (const nlohmann::json::exception& problem) {
    input_error("the record of the training settings is damaged: {}", problem.what());
  }
}

TrainSettings overlay(const TrainSettings& base, const TrainSettings& flags,
                      const std::vector<std::string>& names) {
  ordered_json json = json_of(base);
  const ordered_json given = json_of(flags);
  for (const std::string& name : names) json[name] = given.at(name);
  return settings_of(json);
}

void check_continuation(const TrainSettings& run, const TrainSettings& now) {
  const ordered_json before = json_of(run), after = json_of(now);
  std::vector<std::string> changes;
  visit_settings(run, [&](const SettingInfo& info, const auto&) {
    if (!info.fixed || before[info.name] == after[info.name]) return;
    changes.push_back(fmt::format("--{} is {} and cannot become {}", info.name,
                                  before[info.name].dump(), after[info.name].dump()));
  });
  if (changes.empty()) return;
  input_error(
      "this run was begun with other settings: {}; leave them out, or begin a new run from these "
      "weights with --init",
      fmt::join(changes, "; "));
}

Config model_config(const TrainSettings& settings, int64_t vocab) {
  Config config;
  if (!settings.config.empty()) {
    config = parse_config(read_text_file(settings.config), settings.config, settings.decay);
  } else if (!settings.size.empty()) {
    // A published shape for whatever tokenizer is at hand.
    config = parse_config(to_json(published_config(settings.size)), settings.size, settings.decay);
    config.vocab = vocab;
    config.vocab_padded = (vocab + kVocabMultiple - 1) / kVocabMultiple * kVocabMultiple;
  } else {
    config = parse_config(flags_as_config(settings, vocab), "model flags", settings.decay);
  }
  if (config.vocab < vocab) {
    input_error("{}: vocab_size is {}, but the tokenizer has {} ids", settings.config, config.vocab,
                vocab);
  }
  return config;
}

}  // namespace mamba3
