#include <gtest/gtest.h>

#include <string>

#include "ops/adamw.h"
#include "ops/add_sum.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/delta_scan.h"
#include "ops/delta_step.h"
#include "ops/embedding.h"
#include "ops/grouped_rms_norm.h"
#include "ops/increment.h"
#include "ops/linear.h"
#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "ops/rms_norm.h"
#include "ops/rotary.h"
#include "ops/sample.h"
#include "ops/short_conv.h"
#include "ops/swiglu.h"
#include "support/errors.h"

// A build without CUDA links stubs for the GPU side of every op.

namespace mamba3::testing {
namespace {

std::string unavailable(const std::string& op) {
  return "[" + op + "] this build has no CUDA; use the CPU, or build with -DMAMBA3_CUDA=ON";
}

TEST(NoCuda, EveryOpSaysSo) {
  Context ctx(1);
  EXPECT_EQ(input_error_of([&] { cuda::add_sum(ctx, {}); }), unavailable("add_sum"));
  EXPECT_EQ(input_error_of([&] { cuda::adamw(ctx, {}); }), unavailable("adamw"));
  EXPECT_EQ(input_error_of([&] { cuda::attention(ctx, {}); }), unavailable("attention"));
  EXPECT_EQ(input_error_of([&] { cuda::attention_backward(ctx, {}); }),
            unavailable("attention_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::attention_step(ctx, {}); }), unavailable("attention_step"));
  EXPECT_EQ(input_error_of([&] { cuda::cross_entropy(ctx, {}); }), unavailable("cross_entropy"));
  EXPECT_EQ(input_error_of([&] { cuda::delta_scan(ctx, {}); }), unavailable("delta_scan"));
  EXPECT_EQ(input_error_of([&] { cuda::delta_scan_backward(ctx, {}); }),
            unavailable("delta_scan_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::delta_step(ctx, {}); }), unavailable("delta_step"));
  EXPECT_EQ(input_error_of([&] { cuda::embedding(ctx, {}); }), unavailable("embedding"));
  EXPECT_EQ(input_error_of([&] { cuda::embedding_backward(ctx, {}); }),
            unavailable("embedding_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::grouped_rms_norm(ctx, {}); }),
            unavailable("grouped_rms_norm"));
  EXPECT_EQ(input_error_of([&] { cuda::grouped_rms_norm_backward(ctx, {}); }),
            unavailable("grouped_rms_norm_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::increment(ctx, {}); }), unavailable("increment"));
  EXPECT_EQ(input_error_of([&] { cuda::linear(ctx, {}); }), unavailable("linear"));
  EXPECT_EQ(input_error_of([&] { cuda::linear_backward(ctx, {}); }),
            unavailable("linear_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::mixer_scan(ctx, {}); }), unavailable("mixer_scan"));
  EXPECT_EQ(input_error_of([&] { cuda::mixer_scan_backward(ctx, {}); }),
            unavailable("mixer_scan_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::mixer_step(ctx, {}); }), unavailable("mixer_step"));
  EXPECT_EQ(input_error_of([&] { cuda::rms_norm(ctx, {}); }), unavailable("rms_norm"));
  EXPECT_EQ(input_error_of([&] { cuda::rms_norm_backward(ctx, {}); }),
            unavailable("rms_norm_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::rotary(ctx, {}); }), unavailable("rotary"));
  EXPECT_EQ(input_error_of([&] { cuda::sample(ctx, {}); }), unavailable("sample"));
  EXPECT_EQ(input_error_of([&] { cuda::short_conv(ctx, {}); }), unavailable("short_conv"));
  EXPECT_EQ(input_error_of([&] { cuda::short_conv_backward(ctx, {}); }),
            unavailable("short_conv_backward"));
  EXPECT_EQ(input_error_of([&] { cuda::swiglu(ctx, {}); }), unavailable("swiglu"));
  EXPECT_EQ(input_error_of([&] { cuda::swiglu_backward(ctx, {}); }),
            unavailable("swiglu_backward"));
}

TEST(NoCuda, TheDeviceSwitchLeadsThere) {
  Context ctx(1);
  ctx.device = Device::cuda;
  View y_gate = make_view(&ctx, DType::f32, {1, 6}, Device::cuda);
  const View out = make_view(&ctx + 1, DType::f32, {1, 3}, Device::cuda);
  EXPECT_EQ(input_error_of([&] { swiglu(ctx, {.y_gate = y_gate, .out = out}); }),
            unavailable("swiglu"));
  y_gate.device = Device::cpu;
  EXPECT_EQ(input_error_of([&] { swiglu(ctx, {.y_gate = y_gate, .out = out}); }),
            "[swiglu] y_gate is on the CPU, want the GPU");
}

}  // namespace
}  // namespace mamba3::testing
