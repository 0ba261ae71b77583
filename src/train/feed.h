#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/context.h"
#include "ops/adamw.h"
#include "train/batch.h"

namespace mamba3 {

// All that the host tells the device for a micro batch of an update: the batch and the numbers of
// the step. It is brought there by one copy and always lies in the same place, where recordings
// (core/graph.h) look for it. So the views of a shape do not change, but what they hold does.
class Feed {
 public:
  Feed(Device device, int64_t tokens);  // room for batches of so many tokens

  // `scale`: of the gradient of the loss. The batch has at most `tokens` tokens; it is not needed
  // any more when this returns.
  void fill(Context& ctx, const Batch& batch, float scale, const AdamwNumbers& numbers);

  View scale() const;                        // (1) f32
  View numbers() const;                      // (4) f32, as AdamwArgs wants them
  View ids(int64_t B, int64_t T) const;      // (B, T) i32
  View targets(int64_t B, int64_t T) const;  // (B T) i32

 private:
  std::byte* at(int64_t words) const;

  Device device_;
  std::shared_ptr<void> memory_;
  std::vector<int32_t> staged_;  // what is copied: 4-byte words, some of them floats
};

}  // namespace mamba3
