#pragma once

#include <vector>

#include "core/context.h"
#include "core/memory.h"

namespace mamba3::testing {

// The tests of the ops run on one device: the CPU, or with MAMBA3_TEST_DEVICE=cuda in the
// environment the GPU. Tensors live there (see tensor.h), and so do contexts made here.
Device test_device();

// What activations are in the tests of this device: f32, and on the GPU also bf16.
std::vector<DType> test_dtypes();

// Contexts on the GPU share a stream, so that what one of them computed another can read.
Context make_context(int threads = 2);

// The elements of a view that may be on the GPU, as a view of host memory that `bytes` holds.
struct HostCopy {
  View view;
  std::shared_ptr<void> bytes;
};
HostCopy host_copy(const View& view);

}  // namespace mamba3::testing
