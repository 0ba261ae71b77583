#include "train/feed.h"

#include "support/device.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

using testing::values_of;

TEST(Feed, HoldsABatchAndTheNumbersOfItsStep) {
  Context ctx = testing::make_context(1);
  Feed feed(ctx.device, 6);
  const AdamwNumbers numbers{.lr = 1.5f, .decay = 0.25f, .unbias1 = 2, .unbias2 = 3};
  const Batch wide{.B = 2, .T = 3, .tokens = {1, 2, 3, 4, 5, 6}, .targets = {7, -1, 8, 9, 10, -1}};
  const Batch narrow{.B = 1, .T = 2, .tokens = {11, 12}, .targets = {13, 14}};
  for (const Batch& batch : {wide, narrow, wide}) {
    feed.fill(ctx, batch, 0.5f, numbers);
    const View ids = feed.ids(batch.B, batch.T), targets = feed.targets(batch.B, batch.T);
    EXPECT_EQ(ids.dim(0), batch.B);
    EXPECT_EQ(ids.dim(1), batch.T);
    EXPECT_EQ(values_of(ids), std::vector<double>(batch.tokens.begin(), batch.tokens.end()));
    EXPECT_EQ(values_of(targets), std::vector<double>(batch.targets.begin(), batch.targets.end()));
    EXPECT_EQ(values_of(feed.scale()), std::vector<double>{0.5});
    EXPECT_EQ(values_of(feed.numbers()), (std::vector<double>{1.5, 0.25, 2, 3}));
  }
}

}  // namespace
}  // namespace mamba3
