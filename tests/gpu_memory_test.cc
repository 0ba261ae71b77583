#include <gtest/gtest.h>

#include <cstdio>
#include <string>

#include "core/memory.h"
#include "core/scratch.h"
#include "ops/increment.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/program.h"
#include "support/temp_folder.h"
#include "support/tensor.h"

// What is said when the GPU has too little memory, which this asks for on purpose.

namespace mamba3::testing {
namespace {

constexpr size_t kTooMuch = size_t{8'000'000'000'000};

class GpuMemory : public ::testing::Test {
 protected:
  void SetUp() override {
    if (test_device() == Device::cpu) GTEST_SKIP() << "needs a GPU";
  }
};

// "8000.00 GB more are needed, 79.10 GB of its 85.03 GB are free"
void expect_out_of_memory(const std::string& message, double least_needed, double most_needed) {
  const size_t at = message.find("the GPU is out of memory");
  ASSERT_NE(at, std::string::npos) << message;
  double needed = 0, free = 0, all = 0;
  int length = 0;  // stays 0 unless everything was found
  std::sscanf(message.c_str() + at,
              "the GPU is out of memory: %lf GB more are needed, %lf GB of its %lf GB are free%n",
              &needed, &free, &all, &length);
  ASSERT_GT(length, 0) << message;
  EXPECT_GE(needed, least_needed) << message;
  EXPECT_LE(needed, most_needed) << message;
  EXPECT_GT(all, 0) << message;
  EXPECT_LE(free, all) << message;
  EXPECT_LT(free, needed) << message;
}

TEST_F(GpuMemory, AnAllocationSaysHowMuchIsNeededAndHowMuchThereIs) {
  cuda::reset_peak_bytes();
  expect_out_of_memory(error_of([] { allocate_bytes(Device::cuda, kTooMuch); }), 8000, 8000);
  EXPECT_LT(cuda::peak_bytes(), static_cast<int64_t>(kTooMuch));  // what failed is not counted
  expect_out_of_memory(error_of([] { allocate_zeros(Device::cuda, kTooMuch); }), 8000, 8000);
}

// The error is not left behind for the next launch, and the scratch can be used.
TEST_F(GpuMemory, ScratchThatIsTooLargeHarmsNothing) {
  Context ctx = make_context(1);
  const std::string message = error_of([&] {
    ScratchScope scope(ctx.scratch);
    scope.take<char>(static_cast<int64_t>(kTooMuch));
  });
  expect_out_of_memory(message, 8000, 8000.01);
  ScratchScope scope(ctx.scratch);
  EXPECT_NE(scope.take<float>(1000).data(), nullptr);
  const Tensor counters = Tensor::of_ids({1, 2});
  increment(ctx, {.counters = counters});
  EXPECT_EQ(counters.values(), (std::vector<double>{2, 3}));
}

TEST_F(GpuMemory, ABatchTooLargeToTrainOnSaysSo) {
  const TempFolder folder;
  const auto result = run_program({"train", "--task", "parity", "--steps", "1", "--batch",
                                   "10000000", "--max-length", "1000", "--val-every", "0",
                                   "--device", "cuda", "-o", (folder / "model").string()});
  EXPECT_EQ(result.exit_code, 1) << result.err;
  expect_out_of_memory(result.err, 1000, 1e9);
}

}  // namespace
}  // namespace mamba3::testing
