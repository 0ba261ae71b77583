#include "model/init.h"

#include <gtest/gtest.h>

#include <cmath>

#include "support/compare.h"
#include "support/tensor.h"
#include "support/tiny_model.h"

namespace mamba3::testing {
namespace {

struct Moments {
  double mean = 0, deviation = 0, largest = 0;
};

Moments moments_of(const View& view) {
  Moments m;
  const std::vector<double> values = values_of(view);
  const auto n = static_cast<double>(values.size());
  for (const double x : values) m.mean += x / n;
  for (const double x : values) m.deviation += (x - m.mean) * (x - m.mean) / n;
  for (const double x : values) m.largest = std::max(m.largest, std::abs(x));
  m.deviation = std::sqrt(m.deviation);
  return m;
}

bool all_are(const View& view, double value) {
  for (const double x : values_of(view))
    if (std::abs(x - value) > 1e-7) return false;
  return true;
}

TEST(Init, FollowsTheTable) {
  const Config config = tiny_config("mimo");  // two layers with MLP: four residual branches
  Context ctx(2);
  const NamedTensors p = init_parameters(ctx, config, 1);
  const auto layer = [&](const std::string& name) { return p.at("backbone.layers.1." + name); };
  EXPECT_NEAR(moments_of(p.at("backbone.embedding.weight")).deviation, 0.02, 0.002);
  const double bound = 1 / std::sqrt(32.0);
  const Moments in_proj = moments_of(layer("mixer.in_proj.weight"));
  EXPECT_NEAR(in_proj.deviation, bound / std::sqrt(3.0), 0.01 * bound);
  EXPECT_NEAR(in_proj.mean, 0, 0.02 * bound);
  EXPECT_LE(in_proj.largest, bound);
  EXPECT_NEAR(moments_of(layer("mixer.out_proj.weight")).largest, 1 / std::sqrt(64.0) / 2, 1e-3);
  EXPECT_NEAR(moments_of(layer("mlp.fc2.weight")).largest, 1 / std::sqrt(128.0) / 2, 1e-3);
  for (const char* ones : {"norm.weight", "norm2.weight", "mixer.D", "mixer.B_bias", "mixer.C_bias",
                           "mixer.B_norm.weight", "mixer.mimo_z"}) {
    EXPECT_TRUE(all_are(layer(ones), 1)) << ones;
  }
  EXPECT_TRUE(all_are(layer("mixer.mimo_x"), 0.25));
  EXPECT_TRUE(all_are(layer("mixer.mimo_o"), 0.25));
}

TEST(Init, DtBiasIsTheInverseSoftplusOfALogUniformDraw) {
  Config config = tiny_config("siso");
  config.mixer.H = 512;
  config.dt_min = 1e-3;
  config.dt_max = 0.1;
  config.dt_init_floor = 2e-3;
  Context ctx(1);
  const NamedTensors parameters = init_parameters(ctx, config, 2);
  const View dt_bias = parameters.at("backbone.layers.0.mixer.dt_bias");
  int64_t floored = 0, below_1e_2 = 0;
  for (const double bias : values_of(dt_bias)) {
    const double dt = std::log1p(std::exp(bias));
    EXPECT_GE(dt, 2e-3 * (1 - 1e-5));
    EXPECT_LE(dt, 0.1 * (1 + 1e-5));
    floored += dt < 2e-3 * (1 + 1e-5);
    below_1e_2 += dt < 1e-2;
  }
  EXPECT_NEAR(static_cast<double>(floored) / 512, std::log(2) / std::log(100), 0.05);
  EXPECT_NEAR(static_cast<double>(below_1e_2) / 512, 0.5, 0.07);
}

TEST(Init, DependsOnTheSeedAndTheNameAlone) {
  const Config config = tiny_config("hybrid");
  Context one(1), three(3);
  const NamedTensors a = init_parameters(one, config, 5), b = init_parameters(three, config, 5),
                     c = init_parameters(one, config, 6);
  for (const std::string& name : a.names()) EXPECT_TRUE(same_bits(a.at(name), b.at(name))) << name;
  const std::string fc1 = "backbone.layers.0.mlp.fc1.weight";
  EXPECT_FALSE(same_bits(a.at(fc1), c.at(fc1)));
  EXPECT_FALSE(same_bits(a.at(fc1), a.at("backbone.layers.1.mlp.fc1.weight")));
}

}  // namespace
}  // namespace mamba3::testing
