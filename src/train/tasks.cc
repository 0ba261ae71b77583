#include "train/tasks.h"

#include <fmt/ranges.h>

#include "core/error.h"

namespace mamba3 {

namespace {

// Random bits; the answer is whether the number of ones so far is odd. The smallest task that needs
// an eigenvalue -1 of the state transition (Grazzi et al. 2025): each one flips the state.
class Parity final : public Task {
 public:
  std::string_view name() const override { return "parity"; }
  int64_t vocab() const override { return 2; }
  int64_t min_length() const override { return 1; }
  double chance() const override { return 0.5; }

  void generate(Random& random, Supervision supervision, std::span<int32_t> tokens,
                std::span<int32_t> targets) const override {
    int32_t parity = 0;
    for (size_t t = 0; t < tokens.size(); ++t) {
      tokens[t] = static_cast<int32_t>(random.below(2));
      parity ^= tokens[t];
      const bool asked = supervision == Supervision::every_position || t + 1 == tokens.size();
      targets[t] = asked ? parity : -1;
    }
  }
};

}  // namespace

std::vector<std::string> task_names() {
  return {"parity"};
}

std::unique_ptr<Task> make_task(std::string_view name) {
  if (name == "parity") return std::make_unique<Parity>();
  input_error("unknown task '{}': use {}", name, fmt::join(task_names(), ", "));
}

}  // namespace mamba3
