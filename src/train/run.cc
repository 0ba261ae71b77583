#include "train/run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "formats/text_file.h"
#include "model/checkpoint.h"
#include "model/init.h"
#include "train/sample.h"

namespace mamba3 {

namespace {

namespace fs = std::filesystem;

// An occasional batch may overflow; this many in a row mean that the run has diverged.
constexpr int kMaxSkips = 5;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool due(int64_t step, int64_t every) {
  return every > 0 && step % every == 0;
}

// The checkpoint has the tokenizer of its training; raw bytes need no file.
void copy_tokenizer(const std::string& from, const fs::path& folder) {
  const fs::path to = folder / "tokenizer.json";
  if (from == "bytes") {
    fs::remove(to);
    return;
  }
  write_text_file(to, read_text_file(from));
}

// Paths as any later working directory finds them.
void make_paths_absolute(TrainSettings& settings) {
  for (std::string& path : settings.text) path = fs::absolute(path).lexically_normal();
  for (std::string* path : {&settings.val_text, &settings.config, &settings.init}) {
    if (!path->empty()) *path = fs::absolute(*path).lexically_normal();
  }
  if (settings.tokenizer != "bytes") {
    settings.tokenizer = fs::absolute(settings.tokenizer).lexically_normal();
  }
}

}  // namespace

std::unique_ptr<TrainingRun> TrainingRun::begin(const TrainSettings& settings,
                                                const Options& options) {
  settings.check();
  if (has_run(options.folder) && !options.overwrite) {
    input_error(
        "{} already holds a training run: continue it with --resume, replace it with --overwrite, "
        "or choose another folder",
        options.folder.string());
  }
  SavedRun saved{.settings = settings, .config = {}, .position = {}, .fingerprint = 0, .state = {}};
  make_paths_absolute(saved.settings);
  std::unique_ptr<TrainingRun> run(new TrainingRun(options, std::move(saved)));
  run->read_data();
  run->make_model();
  run->make_folder();
  run->prepare();
  return run;
}

std::unique_ptr<TrainingRun> TrainingRun::resume(const TrainSettings& flags,
                                                 const std::vector<std::string>& names,
                                                 const Options& options) {
  SavedRun saved = load_run(options.folder);
  TrainSettings given = flags;
  make_paths_absolute(given);
  const TrainSettings settings = overlay(saved.settings, given, names);
  check_continuation(saved.settings, settings);
  settings.check();
  saved.settings = settings;
  const uint64_t fingerprint = saved.fingerprint;
  std::unique_ptr<TrainingRun> run(new TrainingRun(options, std::move(saved)));
  run->read_data();
  if (run->saved_.fingerprint != fingerprint) {
    input_error("the text is not the one that this run was begun with: some file has changed");
  }
  run->prepare();
  return run;
}

TrainingRun::TrainingRun(const Options& options, SavedRun saved)
    : options_(options),
      saved_(std::move(saved)),
      context_(options.threads, options.placement.device) {}

void TrainingRun::read_data() {
  const TrainSettings& s = saved_.settings;
  if (!s.task.empty()) {
    task_ = make_task(s.task, s.task_measures());
    source_ = std::make_unique<TaskSource>(*task_, s.task_options());
    return;
  }
  tokenizer_ = s.tokenizer == "bytes" ? Tokenizer::bytes() : Tokenizer::from_file(s.tokenizer);
  corpus_ = read_corpus(
      {.text = {s.text.begin(), s.text.end()}, .validation = s.val_text, .held_out = s.held_out},
      *tokenizer_);
  warnings_ = corpus_.warnings;
  saved_.fingerprint = corpus_.fingerprint();
  source_ = std::make_unique<TextSource>(
      corpus_.train, corpus_.held_out,
      TextSource::Options{.T = s.context, .seed = s.seed, .validation_tokens = s.val_tokens});
  const int64_t scored = source_->validation_rows() * source_->validation_length();
  if (scored == 0) {
    warnings_.push_back("no text is held out: there will be no validation");
  } else {
    const auto targets = std::span(corpus_.held_out).subspan(1, static_cast<size_t>(scored));
    validation_bytes_ = static_cast<double>(tokenizer_->decode(targets, true).size());
  }
}

// Config and initial state of a new run.
void TrainingRun::make_model() {
  const TrainSettings& s = saved_.settings;
  const int64_t vocab = task_ ? task_->vocab() : tokenizer_->vocab_size();
  if (s.init.empty()) {
    saved_.config = model_config(s, vocab);
    saved_.state =
        Trainer::fresh_state(saved_.config, init_parameters(context_, saved_.config, s.seed));
    return;
  }
  const Checkpoint checkpoint = load_checkpoint(s.init, s.decay);
  if (checkpoint.config.vocab < vocab) {
    input_error("{} knows {} ids, but the tokenizer has {}: give the tokenizer it was made with",
                s.init, checkpoint.config.vocab, vocab);
  }
  warnings_.insert(warnings_.end(), checkpoint.warnings.begin(), checkpoint.warnings.end());
  saved_.config = checkpoint.config;
  saved_.state = Trainer::fresh_state(saved_.config, checkpoint.tensors);
}

void TrainingRun::make_folder() {
  std::error_code failure;
  fs::create_directories(options_.folder, failure);
  if (failure) {
    error("cannot make the folder {}: {}", options_.folder.string(), failure.message());
  }
  // With --overwrite: what is left of the old run is not to be continued as the new one.
  fs::remove(options_.folder / "training.safetensors");
  copy_tokenizer(task_ ? "bytes" : saved_.settings.tokenizer, options_.folder);
}

void TrainingRun::prepare() {
  const TrainSettings& s = saved_.settings;
  const int64_t tokens = std::max(s.batch * source_->longest(), source_->validation_length());
  trainer_ = std::make_unique<Trainer>(context_, saved_.config, saved_.state, tokens,
                                       options_.placement.dtype, s.recompute);
  saved_.state = {};
  log_ = std::make_unique<MetricsLog>(options_.folder / "metrics.jsonl", saved_.position.step);
  batches_.resize(static_cast<size_t>(s.accumulate));
  seconds_before_ = saved_.position.seconds;
}

double TrainingRun::progress() const {
  const double target = saved_.settings.target_accuracy;
  if (target > 0 && saved_.position.accuracy >= target) return 1;
  const int64_t steps = saved_.settings.total_steps();
  const double part = steps > 0
                          ? static_cast<double>(saved_.position.step) / static_cast<double>(steps)
                          : saved_.position.seconds / (60 * saved_.settings.minutes);
  return std::min(part, 1.0);
}

// Where the run will be after the update that follows `step` others. By the clock that is not
// known: where it is now.
double TrainingRun::progress_after(int64_t step) const {
  const int64_t steps = saved_.settings.total_steps();
  return steps > 0 ? static_cast<double>(step + 1) / static_cast<double>(steps) : progress();
}

// Where its curriculum will be: as far as the run, or as its updates with a small loss.
double TrainingRun::growth_after(int64_t step) const {
  if (saved_.settings.growth_loss == 0) return progress_after(step);
  return static_cast<double>(saved_.position.solved + 1) /
         static_cast<double>(saved_.settings.total_steps());
}

// The batches of the update that follows `step` others.
void TrainingRun::draw(int64_t step) {
  const int64_t rows = saved_.settings.batch;
  for (int64_t i = 0; i < saved_.settings.accumulate; ++i) {
    source_->train(step, growth_after(step), i * rows, rows, batches_[static_cast<size_t>(i)]);
  }
  drawn_ = step;
}

MetricsRow TrainingRun::step() {
  const TrainSettings& s = saved_.settings;
  RunPosition& position = saved_.position;
  const double begin = now();
  if (drawn_ != position.step) draw(position.step);
  int64_t tokens = 0;
  for (const Batch& batch : batches_) tokens += batch.B * batch.T;
  const double lr = s.learning_rate().at(progress_after(position.step));
  trainer_->start(batches_, s.optimizer(), lr);
  // Meanwhile a GPU computes. A curriculum that waits for the loss of this update cannot.
  if (s.growth_loss == 0 && progress_after(position.step) < 1) draw(position.step + 1);
  const Update update = trainer_->finish();
  ++position.step;
  if (update.loss < s.growth_loss) ++position.solved;
  position.tokens += tokens;
  return {.step = position.step,
          .tokens = position.tokens,
          .loss = update.loss,
          .lr = lr,
          .grad_norm = update.grad_norm,
          .tokens_per_second = static_cast<double>(tokens) / (now() - begin),
          .skipped = !update.applied};
}

void TrainingRun::validate(MetricsRow& row) {
  if (source_->validation_rows() == 0) return;
  const Evaluation result = trainer_->validate(*source_, task_ != nullptr);
  row.val_loss = result.loss();
  if (task_) row.accuracy = saved_.position.accuracy = result.accuracy();
  if (validation_bytes_ > 0) {
    row.bits_per_byte = result.nll / validation_bytes_ / std::numbers::ln2;
  }
}

std::string TrainingRun::sample() {
  const TrainSettings& s = saved_.settings;
  const uint64_t seed = derive_seed(s.seed, fmt::format("sample {}", saved_.position.step));
  return sample_text(
      trainer_->model(), *tokenizer_,
      {.prompt = s.prompt, .tokens = s.sample_tokens, .seed = seed, .threads = options_.threads});
}

void TrainingRun::save() {
  saved_.state = trainer_->state();
  save_run(options_.folder, saved_);
  saved_.state = {};
}

RunEnd TrainingRun::run(RunObserver& observer) {
  const TrainSettings& s = saved_.settings;
  const double begin = now();
  int skips = 0;
  bool stopped = false;
  while (!stopped && progress() < 1) {
    MetricsRow row = step();
    saved_.position.seconds = seconds_before_ + now() - begin;
    stopped = observer.stop();
    const bool last = progress() >= 1;
    if (last || due(row.step, s.val_every)) validate(row);
    if (tokenizer_ && due(row.step, s.sample_every)) row.sample = sample();
    row.seconds = saved_.position.seconds = seconds_before_ + now() - begin;
    log_->append(row);
    observer.on_row(row);
    skips = row.skipped ? skips + 1 : 0;
    if (skips == kMaxSkips) {
      throw DivergedError(fmt::format(
          "the loss or its gradient was not finite {} times in a row, up to step {}: the run has "
          "diverged; {} keeps the last checkpoint. A lower --lr usually helps",
          skips, row.step, options_.folder.string()));
    }
    if (!last && !stopped && due(row.step, s.save_every)) save();
  }
  save();
  seconds_before_ = saved_.position.seconds;
  return progress() >= 1 ? RunEnd::finished : RunEnd::stopped;
}

}  // namespace mamba3
