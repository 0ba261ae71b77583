#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.h"
#include "train/batch.h"
#include "train/schedule.h"
#include "train/trainer.h"

namespace mamba3 {

// Everything that decides the numbers of a training run. The names are those of the program's
// flags; the same table (visit_settings) makes the flags, the record in a checkpoint and the
// comparison when a run is continued.
struct TrainSettings {
  // Data: a text, or the sequences of a task.
  std::vector<std::string> text;
  std::string val_text;
  double held_out = 0.05;
  std::string tokenizer = "bytes";
  int64_t val_tokens = 65536;
  std::string task;
  int64_t symbols = 128, pairs = 64, copied = 4;
  std::string supervision = "every";
  int64_t min_length = 3, max_length = 160, shortest = 0;
  double growth = 0.5, growth_loss = 0;
  int64_t val_length = 256, val_rows = 256;
  double target_accuracy = 0;

  // Model.
  std::string size, config, init;
  int64_t d_model = 128, layers = 4, d_state = 64, headdim = 32, groups = 1, expand = 2;
  int64_t mlp = 256;
  double rope_fraction = 0.5;
  bool mimo = false;
  int64_t rank = 4;
  bool out_norm = false, untied = false;
  std::string decay = "auto";
  double dt_min = 1e-3, dt_max = 0.1;
  std::vector<std::string> mixer = {"mamba3"};
  std::string rope = "data", discretisation = "trapezoidal";
  bool no_bc_bias = false;
  int64_t external_conv = 0;
  bool negative_eigenvalues = false;
  int64_t attention_heads = 4, attention_kv_heads = 0, attention_rope = 0;

  // Length and batch.
  int64_t steps = 1000, tokens = 0;
  double minutes = 0;
  int64_t batch = 8, context = 256, accumulate = 1;
  bool recompute = false;

  // Optimiser.
  double lr = 3e-3, min_lr = 0, warmup = 0.05, cooldown = 0.2;
  std::string schedule = "cosine";
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1, clip = 1.0;
  uint64_t seed = 0;

  // What happens on the way.
  int64_t val_every = 100, sample_every = 0, save_every = 500;
  int64_t sample_tokens = 128;
  std::string prompt = "\n";

  Schedule learning_rate() const;
  OptimizerSettings optimizer() const;
  Supervision task_supervision() const;
  TaskOptions task_measures() const;
  TaskSource::Options task_options() const;
  // Updates of the whole run; 0 when it ends by the clock.
  int64_t total_steps() const;
  // Throws InputError naming the flag.
  void check() const;
};

// A row of the table of settings.
struct SettingInfo {
  const char* name;   // of the flag, without the dashes
  const char* group;  // heading in the help
  std::string help;
  bool fixed = true;  // may not change when a run is continued
};

// Calls visit(SettingInfo, member) for every setting, in the order of the help.
template <typename Settings, typename Visit>
void visit_settings(Settings& s, Visit&& visit) {
  const char* group = "Data";
  visit(SettingInfo{"text", group, "Text files, or folders of them"}, s.text);
  visit(SettingInfo{"val-text", group, "Validate on this file or folder, and hold nothing back"},
        s.val_text);
  visit(SettingInfo{"held-out", group, "Part of each file, its end, that is held out to validate"},
        s.held_out);
  visit(SettingInfo{"tokenizer", group, "bytes, or a tokenizer.json"}, s.tokenizer);
  visit(SettingInfo{"val-tokens", group, "Validate on the first so many held-out tokens"},
        s.val_tokens);
  group = "Task, instead of a text";
  visit(SettingInfo{"task", group, "Learn a synthetic task: " + list_of_tasks()}, s.task);
  visit(SettingInfo{"symbols", group, "Keys of associative_recall, and values; alphabet of needle"},
        s.symbols);
  visit(SettingInfo{"pairs", group, "Pairs of a key and a value in associative_recall, at most"},
        s.pairs);
  visit(SettingInfo{"copied", group, "Tokens to copy in needle"}, s.copied);
  visit(SettingInfo{"supervision", group, "Score the answer at every position, or the final one"},
        s.supervision);
  visit(SettingInfo{"min-length", group, "First length of the curriculum"}, s.min_length);
  visit(SettingInfo{"max-length", group, "Last length of the curriculum"}, s.max_length);
  visit(SettingInfo{"shortest", group,
                    "Draw the length of an update from this up to the curriculum's; 0: take that"},
        s.shortest);
  visit(SettingInfo{"growth", group, "Part of the run in which the length grows"}, s.growth);
  visit(SettingInfo{"growth-loss", group,
                    "Let only updates with a loss below this count for the growth; 0: all"},
        s.growth_loss);
  visit(SettingInfo{"val-length", group, "Length of the sequences to validate on"}, s.val_length);
  visit(SettingInfo{"val-rows", group, "Number of them"}, s.val_rows);
  visit(SettingInfo{"target-accuracy", group,
                    "End the run when so much of a validation is right, from 0 to 1; 0: go on",
                    false},
        s.target_accuracy);
  group = "Model";
  visit(SettingInfo{"size", group, "A published size, such as 187m-siso, instead of the flags"},
        s.size);
  visit(SettingInfo{"config", group, "A config.json, instead of the flags"}, s.config);
  visit(SettingInfo{"init", group, "Start from the weights of this checkpoint folder"}, s.init);
  visit(SettingInfo{"d-model", group, "Width D"}, s.d_model);
  visit(SettingInfo{"layers", group, "Layers"}, s.layers);
  visit(SettingInfo{"d-state", group, "State size N"}, s.d_state);
  visit(SettingInfo{"headdim", group, "Head dimension P"}, s.headdim);
  visit(SettingInfo{"groups", group, "Groups G of B and C"}, s.groups);
  visit(SettingInfo{"expand", group, "Inner width as a multiple of D"}, s.expand);
  visit(SettingInfo{"mlp", group, "Width of the MLP, rounded up to a multiple of 128; 0: none"},
        s.mlp);
  visit(SettingInfo{"mixer", group,
                    "What layers mix with: mamba3, mamba2, gated_deltanet or attention; several "
                    "take turns: mamba3,mamba3,attention"},
        s.mixer);
  visit(SettingInfo{"rope-fraction", group, "Part of the state that rotates: 0.5 or 1"},
        s.rope_fraction);
  visit(SettingInfo{"mimo", group, "Multi-input multi-output mixers"}, s.mimo);
  visit(SettingInfo{"rank", group, "Rank R of MIMO"}, s.rank);
  visit(SettingInfo{"out-norm", group, "Norm before the gate of the mixer"}, s.out_norm);
  visit(SettingInfo{"untied", group, "A head of its own instead of the embedding"}, s.untied);
  visit(SettingInfo{"decay", group, "How the raw decay becomes A: heavy_tail, softplus, or auto"},
        s.decay);
  visit(SettingInfo{"dt-min", group, "Smallest step size dt that a head begins with"}, s.dt_min);
  visit(SettingInfo{"dt-max", group, "Largest"}, s.dt_max);
  group = "Model, what differs from Mamba-3 as published";
  visit(SettingInfo{"rope", group,
                    "Rotation of the state: data, standard (positions) or none (a real state)"},
        s.rope);
  visit(SettingInfo{"discretisation", group,
                    "trapezoidal, half (lam = 1/2) or euler (lam = 1, as in Mamba-2)"},
        s.discretisation);
  visit(SettingInfo{"no-bc-bias", group, "No bias of B and C"}, s.no_bc_bias);
  visit(SettingInfo{"external-conv", group,
                    "Width of a short convolution over x, B and C; 0: none, as published"},
        s.external_conv);
  visit(SettingInfo{"negative-eigenvalues", group,
                    "Gated DeltaNet with eigenvalues in [-1, 1] instead of [0, 1]"},
        s.negative_eigenvalues);
  visit(SettingInfo{"attention-heads", group, "Heads of attention layers, of D / heads channels"},
        s.attention_heads);
  visit(SettingInfo{"attention-kv-heads", group, "Heads of their keys and values; 0: as many"},
        s.attention_kv_heads);
  visit(SettingInfo{"attention-rope", group,
                    "Channels of a head that rotate with the position; 0: no positions"},
        s.attention_rope);
  group = "Length and batch";
  visit(SettingInfo{"steps", group, "Updates to make", false}, s.steps);
  visit(SettingInfo{"tokens", group, "Tokens to train on, instead of steps", false}, s.tokens);
  visit(SettingInfo{"minutes", group, "Minutes to train for, instead of steps", false}, s.minutes);
  visit(SettingInfo{"batch", group, "Sequences side by side"}, s.batch);
  visit(SettingInfo{"context", group, "Tokens of a sequence"}, s.context);
  visit(SettingInfo{"accumulate", group, "Batches to an update"}, s.accumulate);
  visit(SettingInfo{"recompute", group,
                    "Do each layer's forward again in the backward: less memory, more time", false},
        s.recompute);
  group = "Optimiser";
  visit(SettingInfo{"lr", group, "Peak learning rate"}, s.lr);
  visit(SettingInfo{"min-lr", group, "Learning rate at the end"}, s.min_lr);
  visit(SettingInfo{"warmup", group, "Part of the run in which the rate rises from 0"}, s.warmup);
  visit(SettingInfo{"schedule", group, "What follows: cosine, wsd or constant"}, s.schedule);
  visit(SettingInfo{"cooldown", group, "Part of the run, its end, in which wsd falls"}, s.cooldown);
  visit(SettingInfo{"beta1", group, "AdamW"}, s.beta1);
  visit(SettingInfo{"beta2", group, "AdamW"}, s.beta2);
  visit(SettingInfo{"eps", group, "AdamW"}, s.eps);
  visit(SettingInfo{"weight-decay", group, "AdamW, on matrices only"}, s.weight_decay);
  visit(SettingInfo{"clip", group, "Largest norm of the gradient; 0: any"}, s.clip);
  visit(SettingInfo{"seed", group, "Of the initial weights and the order of the data"}, s.seed);
  group = "On the way";
  visit(SettingInfo{"val-every", group, "Steps between validations; 0: only at the end", false},
        s.val_every);
  visit(SettingInfo{"sample-every", group, "Steps between samples of text; 0: none", false},
        s.sample_every);
  visit(SettingInfo{"sample-tokens", group, "Length of a sample", false}, s.sample_tokens);
  visit(SettingInfo{"prompt", group, "What a sample continues", false}, s.prompt);
  visit(SettingInfo{"save-every", group, "Steps between checkpoints; 0: only at the end", false},
        s.save_every);
}

// Where a run starts from unless flags say otherwise: the members above for a text, settings that
// solve it for a task, where the first step sizes also depend on the mixer. Throws InputError for a
// task that does not exist.
TrainSettings default_settings(std::string_view task,
                               const std::vector<std::string>& mixer = {"mamba3"});

// One flat JSON object with the names of the flags, and back. Keys that are absent keep their
// defaults, so a record of an older version can be read; unknown ones throw InputError.
std::string to_json(const TrainSettings& settings);
TrainSettings parse_settings(std::string_view json);

// `base` with the named settings taken from `flags`.
TrainSettings overlay(const TrainSettings& base, const TrainSettings& flags,
                      const std::vector<std::string>& names);

// Throws InputError naming the flags that differ but are fixed once a run has begun.
void check_continuation(const TrainSettings& run, const TrainSettings& now);

// The model that the flags describe (or --size, --config), for a vocabulary of `vocab` ids.
Config model_config(const TrainSettings& settings, int64_t vocab);

}  // namespace mamba3
