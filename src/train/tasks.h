#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/random.h"

namespace mamba3 {

// Where a sequence of a task is scored.
enum class Supervision : uint8_t {
  every_position,  // wherever the task defines an answer: denser, for training
  final_answer,    // only what the tables of papers report: the answer, or answers, of the whole
};

// The measures of the tasks that have some.
struct TaskOptions {
  int64_t symbols = 128;  // associative_recall: keys, and as many values; needle: its alphabet
  int64_t pairs = 64;     // associative_recall: of a key and a value, at most
  int64_t copied = 4;     // needle: tokens to copy
};

// A synthetic language with right answers, for questions about what a mixer can do. Its sequences
// come from a random generator, so there is no data set and no sequence is seen twice.
class Task {
 public:
  virtual ~Task() = default;

  virtual std::string_view name() const = 0;
  virtual int64_t vocab() const = 0;       // ids below this occur, as tokens and as targets
  virtual int64_t min_length() const = 0;  // shortest sequence with an answer
  virtual double chance() const = 0;       // accuracy of guessing among all answers there are
  // One sequence of tokens.size() >= min_length() tokens. targets[t] is the answer after tokens
  // [0, t], or -1 where nothing is asked. Something is asked after the last token.
  virtual void generate(Random& random, Supervision supervision, std::span<int32_t> tokens,
                        std::span<int32_t> targets) const = 0;
};

// Accuracy on the scale where guessing is 0 and perfection 1 (paper, table 5b).
inline double scaled_accuracy(const Task& task, double accuracy) {
  return (accuracy - task.chance()) / (1 - task.chance());
}

std::vector<std::string> task_names();
std::string list_of_tasks();  // the names, as help texts and errors show them
// Throws InputError that lists the names, or for measures that the task cannot have.
std::unique_ptr<Task> make_task(std::string_view name, const TaskOptions& options = {});

}  // namespace mamba3
