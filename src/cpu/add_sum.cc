#include "ops/add_sum.h"

namespace mamba3::cpu {

void add_sum(Context&, const AddSumArgs& args) {
  const float* const values = args.values.as<float>();
  double sum = 0;
  for (int64_t i = 0; i < args.values.size(); ++i) sum += static_cast<double>(values[i]);
  *args.total.as<double>() += sum;
}

}  // namespace mamba3::cpu
