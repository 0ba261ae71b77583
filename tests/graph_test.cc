#include "core/graph.h"

#include "core/fetch.h"
#include "core/memory.h"
#include "ops/increment.h"
#include "support/compare.h"
#include "support/device.h"
#include "support/errors.h"
#include "support/mixer.h"
#include "support/tensor.h"

namespace mamba3::testing {
namespace {

bool on_gpu() {
  return test_device() == Device::cuda;
}

TEST(Graph, EveryRunDoesWhatTheOpsDo) {
  Context ctx = make_context();
  const Tensor counters = Tensor::of_ids({0, 10});
  Graph graph;
  int calls = 0;
  for (int run = 1; run <= 5; ++run) {
    graph.run(ctx, [&] {
      ++calls;
      increment(ctx, {.counters = counters, .by = 2});
      increment(ctx, {.counters = counters});
    });
    EXPECT_EQ(counters.values(), (std::vector<double>{3. * run, 10 + 3. * run}));
  }
  EXPECT_EQ(calls, on_gpu() ? 2 : 5);
  EXPECT_EQ(graph.recorded(), on_gpu());
}

TEST(Graph, ClearStartsOver) {
  Context ctx = make_context();
  const Tensor first = Tensor::of_ids({0}), second = Tensor::of_ids({0});
  Graph graph;
  for (int run = 0; run < 3; ++run) graph.run(ctx, [&] { increment(ctx, {.counters = first}); });
  graph.clear();
  EXPECT_FALSE(graph.recorded());
  for (int run = 0; run < 4; ++run) graph.run(ctx, [&] { increment(ctx, {.counters = second}); });
  EXPECT_EQ(first.values(), std::vector<double>{3});
  EXPECT_EQ(second.values(), std::vector<double>{4});
}

// The ops found their scratch at the old address.
TEST(Graph, StartsOverWhenTheScratchHasMoved) {
  Context ctx = make_context();
  const Tensor counter = Tensor::of_ids({0});
  Graph graph;
  int calls = 0;
  const auto run = [&] {
    graph.run(ctx, [&] {
      ++calls;
      ScratchScope scope(ctx.scratch);
      const View here = make_view(scope.take<int32_t>(1).data(), DType::i32, {1}, ctx.device);
      copy(ctx, counter, here);
      increment(ctx, {.counters = here});
      copy(ctx, here, counter);
    });
  };
  for (int i = 0; i < 3; ++i) run();
  {
    ScratchScope scope(ctx.scratch);
    scope.take<float>(int64_t{1} << 20);
  }
  for (int i = 0; i < 3; ++i) run();
  EXPECT_EQ(counter.values(), std::vector<double>{6});
  EXPECT_EQ(calls, on_gpu() ? 4 : 6);
}

TEST(Graph, RefusesOpsThatWait) {
  if (!on_gpu()) GTEST_SKIP() << "the CPU records nothing";
  Context ctx(1, Device::cuda);  // a stream of its own
  const Tensor counter = Tensor::of_ids({0});
  Graph graph;
  const auto run = [&] {
    graph.run(ctx, [&] {
      increment(ctx, {.counters = counter});
      synchronize(ctx);
    });
  };
  run();
  const std::string error = error_of([&] { run(); });
  EXPECT_NE(error.find("[waiting for the GPU] CUDA: "), std::string::npos) << error;
  increment(ctx, {.counters = counter});  // the stream can be used again
  synchronize(ctx);
  EXPECT_EQ(counter.values(), std::vector<double>{2});
}

TEST(Fetch, BringsWhatWasThereWhenItWasAsked) {
  Context ctx = make_context();
  const Tensor counters = Tensor::of_ids({1, 2});
  Fetch fetch(ctx.device, 2 * sizeof(int32_t));
  for (int32_t run = 0; run < 3; ++run) {
    fetch.start(ctx, counters);
    increment(ctx, {.counters = counters});
    const auto* got = static_cast<const int32_t*>(fetch.wait());
    EXPECT_EQ(got[0], 1 + run);
    EXPECT_EQ(got[1], 2 + run);
  }
}

TEST(Fetch, HasRoomForSoMuch) {
  Context ctx = make_context();
  Fetch fetch(ctx.device, 4);
  EXPECT_EQ(error_of([&] {
              fetch.start(ctx, Tensor::of_ids({1, 2}));
            }),
            "[fetch] i32 (2) must be contiguous and at most 4 bytes");
}

// Two launches of one kernel that ask for different amounts of shared memory, more than a block has
// without asking: the second must not take from the first.
TEST(Graph, KernelsOfSeveralSizes) {
  Context ctx = make_context();
  Random random(6);
  struct Scan {
    MixerShape shape;
    MixerParamTensors params;
    Tensor proj, y;

    Scan(Random& random, const MixerShape& s)
        : shape(s),
          params(random, s),
          proj(Tensor::normal(random, {1, 40, s.d_proj()})),
          y({1, 40, s.d_inner()}) {}
    void run(Context& ctx) const {
      mixer_scan(ctx, {.shape = shape,
                       .params = params.views(shape),
                       .proj = proj,
                       .y = y,
                       .schedule = on_gpu() ? MixerSchedule::walk : MixerSchedule::best});
    }
  };
  const Scan large(random, {.H = 2, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32});
  const Scan small(random, {.H = 2, .P = 48, .N = 96, .G = 1, .R = 1, .S = 24});
  Graph graph;
  std::vector<double> first;
  for (int run = 0; run < 3; ++run) {
    graph.run(ctx, [&] {
      large.run(ctx);
      small.run(ctx);
    });
    if (run == 0) first = large.y.values();
    EXPECT_EQ(large.y.values(), first);
  }
}

}  // namespace
}  // namespace mamba3::testing
