#pragma once

#include <gtest/gtest.h>

#include "hwy/targets.h"
#include "support/device.h"

namespace mamba3::testing {

// Runs body once for every instruction set that this machine has and the library was built for: the
// kernels choose theirs at run time, and the others would never be tested. On the GPU: once.
template <typename Body>
void for_each_instruction_set(Body&& body) {
  if (test_device() != Device::cpu) return body();
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
}

}  // namespace mamba3::testing
