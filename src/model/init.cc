#include "model/init.h"

#include <cmath>
#include <functional>

#include "core/random.h"

namespace mamba3 {

namespace {

// The inverse of softplus: y with log(1 + e^y) = x.
double inverse_softplus(double x) {
  return x + std::log(-std::expm1(-x));
}

// How one element of a tensor is drawn.
using Draw = std::function<double(Random&)>;

Draw uniform_in(double bound) {
  return [bound](Random& random) { return bound * (2 * random.uniform() - 1); };
}

Draw constant(double value) {
  return [value](Random&) { return value; };
}

Draw draw_of(const Config& config, const TensorSpec& spec) {
  const double fan_in_bound = 1 / std::sqrt(static_cast<double>(spec.dims.back()));
  const auto branches = static_cast<double>(config.n_layer * (config.d_mlp > 0 ? 2 : 1));
  switch (spec.init) {
    case Init::zeros:
      return constant(0);
    case Init::ones:
      return constant(1);
    case Init::normal:
      return [](Random& random) { return 0.02 * random.normal(); };
    case Init::fan_in:
      return uniform_in(fan_in_bound);
    case Init::residual_out:
      return uniform_in(fan_in_bound / std::sqrt(branches));
    case Init::inverse_rank:
      return constant(1.0 / static_cast<double>(config.mixer.R));
    case Init::A_log:  // A from -16 to -1
      return [](Random& random) { return std::log(1 + 15 * random.uniform()); };
    case Init::dt_bias:
      return [low = std::log(config.dt_min), high = std::log(config.dt_max),
              floor = config.dt_init_floor](Random& random) {
        const double dt = std::exp(low + random.uniform() * (high - low));
        return inverse_softplus(std::max(dt, floor));
      };
  }
  return constant(0);
}

}  // namespace

NamedTensors init_parameters(Context& ctx, const Config& config, uint64_t seed) {
  const std::vector<TensorSpec> table = parameter_table(config);
  NamedTensors tensors = allocate(table);
  for (const TensorSpec& spec : table) {
    const View& view = tensors.at(spec.name);
    float* values = view.as<float>();
    const Draw draw = draw_of(config, spec);
    const uint64_t tensor_seed = derive_seed(seed, spec.name);
    // A stream for each row, so that rows can be drawn by any thread.
    const int64_t rows = view.rank > 1 ? view.dim(0) : 1, columns = view.size() / rows;
    ctx.threads.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        Random random(tensor_seed, 0, static_cast<uint32_t>(row));
        for (int64_t i = 0; i < columns; ++i)
          values[row * columns + i] = static_cast<float>(draw(random));
      }
    });
  }
  return tensors;
}

}  // namespace mamba3
