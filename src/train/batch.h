#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "train/tasks.h"

namespace mamba3 {

// Sequences side by side: tokens and targets are (B, T), row by row. A target is what the model
// should say after the token at its place; -1 is not scored.
struct Batch {
  int64_t B = 0, T = 0;
  std::vector<int32_t> tokens, targets;

  void resize(int64_t rows, int64_t length);
  std::span<int32_t> row_tokens(int64_t b);
  std::span<int32_t> row_targets(int64_t b);
  int64_t scored() const;  // targets that are not -1
};

// Where batches come from. A batch is a pure function of its place in the run, so that a run can be
// cut anywhere and continued, or repeated, with the same data.
class BatchSource {
 public:
  virtual ~BatchSource() = default;

  virtual int64_t longest() const = 0;  // the largest T of any batch
  // Rows [first_row, first_row + rows) of update `step`, when `progress` of the run, or of what its
  // curriculum counts, is over.
  virtual void train(int64_t step, double progress, int64_t first_row, int64_t rows,
                     Batch& out) const = 0;

  // The validation set is fixed: its rows have the length validation_length(), and there are
  // validation_rows() of them, 0 if nothing is held out.
  virtual int64_t validation_length() const = 0;
  virtual int64_t validation_rows() const = 0;
  virtual void validate(int64_t first_row, int64_t rows, Batch& out) const = 0;
};

// Random windows of a text: T tokens, and as targets the same moved by one.
class TextSource final : public BatchSource {
 public:
  struct Options {
    int64_t T = 256;
    uint64_t seed = 0;
    int64_t validation_tokens = 65536;  // of the held-out text, from its start, at most
  };
  // The streams are kept by reference. Throws InputError when `train` is shorter than T + 1.
  TextSource(std::span<const int32_t> train, std::span<const int32_t> held_out,
             const Options& options);

  int64_t longest() const override { return options_.T; }
  void train(int64_t step, double progress, int64_t first_row, int64_t rows,
             Batch& out) const override;
  int64_t validation_length() const override { return validation_length_; }
  int64_t validation_rows() const override { return validation_rows_; }
  void validate(int64_t first_row, int64_t rows, Batch& out) const override;

 private:
  std::span<const int32_t> train_, held_out_;
  Options options_;
  uint64_t seed_;
  int64_t validation_length_ = 0, validation_rows_ = 0;
};

// How long the sequences of a task are: a curriculum that grows from `first` to `last` during the
// part `growth` of the run, by the same factor in equal times, and stays. What can be learnt from
// short sequences is learnt there, where an update costs little.
struct Curriculum {
  int64_t first = 0, last = 0;
  double growth = 0;

  int64_t at(double progress) const;
};

// Sequences of a task, made as they are needed.
class TaskSource final : public BatchSource {
 public:
  struct Options {
    Curriculum length;
    // Not 0: every update draws its length from here up to the curriculum's, so that short
    // sequences stay part of the training.
    int64_t shortest = 0;
    Supervision supervision = Supervision::every_position;
    uint64_t seed = 0;
    int64_t validation_length = 0, validation_rows = 0;
  };
  // The task is kept by reference. Throws InputError for lengths that the task cannot have.
  TaskSource(const Task& task, const Options& options);

  int64_t longest() const override { return options_.length.last; }
  // With every position scored all rows have the update's length. With final answers alone they
  // have lengths from the task's shortest up to it, padded at the end with what is not scored.
  void train(int64_t step, double progress, int64_t first_row, int64_t rows,
             Batch& out) const override;
  int64_t validation_length() const override { return options_.validation_length; }
  int64_t validation_rows() const override { return options_.validation_rows; }
  // Scored at the final answer. Its sequences do not depend on the training seed.
  void validate(int64_t first_row, int64_t rows, Batch& out) const override;

 private:
  const Task& task_;
  Options options_;
  int64_t length_of(int64_t step, double progress) const;

  uint64_t train_seed_, length_seed_, validation_seed_;
};

}  // namespace mamba3
