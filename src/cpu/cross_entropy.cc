// The work is cut into slices of tokens and tiles of vocabulary. For each slice
//   1. for every tile: logits = hidden weight^T, and the log-sum-exp of the rows so far is updated;
//   2. nll = lse - logits[target];
//   3. with gradients, for every tile: g = scale (exp(logits - lse) - [v = target]) in the logits'
//      place, d_hidden += g weight, d_weight += g^T hidden.
// So step 3 finds the logits of its slice, which must all be kept; without gradients one tile is.
// Weights in 16 bits are widened a tile at a time.

#include "ops/cross_entropy.h"

#include <cmath>
#include <limits>

#include "cpu/convert.h"
#include "cpu/gemm.h"
#include "cpu/grain.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cross_entropy.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "cpu/simd-inl.h"

#ifndef MAMBA3_CPU_CROSS_ENTROPY_ONCE  // not once a target
#define MAMBA3_CPU_CROSS_ENTROPY_ONCE
namespace mamba3::cpu {
namespace {

// A token's logits as far as they were seen: log(sum_v exp(logits_v)) is max + log(sum). A NaN
// among them makes sum NaN.
struct Row {
  float max = -std::numeric_limits<float>::infinity();
  double sum = 0;
  float target = 0;  // the logit of the target

  float lse() const { return static_cast<float>(static_cast<double>(max) + std::log(sum)); }
};

}  // namespace
}  // namespace mamba3::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace mamba3::cpu::HWY_NAMESPACE {
namespace {

void add_logits(const float* logits, int64_t n, Row& row) {
  Vector most = hn::Set(kLanes, row.max);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    most = hn::Max(most, access.keep(access.load(logits + i), most));
  });
  const float before = row.max, now = max_of(most);
  Vector sum = hn::Zero(kLanes);
  const Vector shift = hn::Set(kLanes, now);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    const Vector e = exp(hn::Sub(access.load(logits + i), shift));
    sum = hn::Add(sum, access.keep(e, hn::Zero(kLanes)));
  });
  row.max = now;
  row.sum = row.sum * std::exp(static_cast<double>(before) - static_cast<double>(now)) +
            static_cast<double>(sum_of(sum));
}

// scale * softmax, in the place of the logits.
void logits_to_gradient(float* logits, int64_t n, float lse, float scale) {
  const Vector shift = hn::Set(kLanes, lse), factor = hn::Set(kLanes, scale);
  for_each_vector(n, [&](auto access, int64_t i) HWY_ATTR {
    access.store(hn::Mul(exp(hn::Sub(access.load(logits + i), shift)), factor), logits + i);
  });
}

}  // namespace
}  // namespace mamba3::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace mamba3::cpu {

HWY_EXPORT(add_logits);
HWY_EXPORT(logits_to_gradient);

namespace {

// Vocabulary rows in a tile at most: a product of this width runs at the full rate.
constexpr int64_t kTileColumns = 4096;
// Tokens in a slice, and logits kept with gradients (128 MB, 261 tokens of the published
// vocabulary): a larger slice reads and writes the weights and their gradient less often.
constexpr int64_t kSliceRows = 512, kSliceLogits = int64_t{32} << 20;

struct Tile {
  int64_t begin, size;  // of the vocabulary
};

class CrossEntropy {
 public:
  CrossEntropy(Context& ctx, const CrossEntropyArgs& args)
      : ctx_(ctx), args_(args), scope_(ctx.scratch) {
    const int64_t M = args.hidden.dim(0);
    const int64_t fit = gradients() ? std::max<int64_t>(kSliceLogits / args.vocab, 16) : kSliceRows;
    slice_rows_ = std::min({M, kSliceRows, fit});
    width_ = gradients() ? args.vocab : std::min(args.vocab, kTileColumns);
    logits_ = scope_.take<float>(slice_rows_ * width_);
    rows_of_slice_ = scope_.take<Row>(slice_rows_);
  }

  void run() {
    const int64_t M = args_.hidden.dim(0);
    for (begin_ = 0; begin_ < M; begin_ += slice_rows_) {
      rows_ = std::min(slice_rows_, M - begin_);
      forward();
      if (gradients()) backward();
    }
  }

 private:
  bool gradients() const { return !args_.d_hidden.empty() || !args_.d_weight.empty(); }
  int64_t D() const { return args_.hidden.dim(1); }
  float scale() const { return args_.scale.empty() ? 1.0f : *args_.scale.as<float>(); }

  // Calls use(the rows of a tile as f32, the tile) for tiles that cover the vocabulary.
  template <typename Use>
  void for_each_tile(const Use& use) {
    for (int64_t v = 0; v < args_.vocab; v += kTileColumns) {
      const View rows = args_.weight.slice(0, v, std::min(v + kTileColumns, args_.vocab));
      for_f32_tiles(ctx_, rows, [&](const float* weight, int64_t first, int64_t last) {
        use(weight, Tile{v + first, last - first});
      });
    }
  }
  template <typename Body>
  void for_each_row(int64_t columns, const Body& body) {
    ctx_.threads.parallel_for(rows_, grain_for(columns), [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }

  // The tile of logits of a row of the slice.
  float* logits(int64_t row, const Tile& tile) {
    return logits_.data() + row * width_ + (gradients() ? tile.begin : 0);
  }
  float* slice_of(const View& view) { return view.as<float>() + begin_ * view.stride(0); }
  int32_t target(int64_t row) const { return args_.targets.as<int32_t>()[begin_ + row]; }
  Row& at(int64_t row) { return rows_of_slice_[static_cast<size_t>(row)]; }
  static bool holds(const Tile& tile, int32_t v) {
    return v >= tile.begin && v < tile.begin + tile.size;
  }

  void forward() {
    std::fill(rows_of_slice_.begin(), rows_of_slice_.end(), Row{});
    for_each_tile([&](const float* weight, const Tile& tile) { add_tile(weight, tile); });
    for (int64_t row = 0; row < rows_; ++row) finish_row(row);
  }

  void add_tile(const float* weight, const Tile& tile) {
    gemm(ctx_, {.transpose_b = true,
                .M = rows_,
                .N = tile.size,
                .K = D(),
                .a = slice_of(args_.hidden),
                .lda = row_stride(args_.hidden),
                .b = weight,
                .ldb = D(),
                .c = logits(0, tile),
                .ldc = width_});
    const auto add = HWY_DYNAMIC_DISPATCH(add_logits);
    for_each_row(tile.size, [&](int64_t row) {
      add(logits(row, tile), tile.size, at(row));
      if (holds(tile, target(row))) at(row).target = logits(row, tile)[target(row) - tile.begin];
    });
  }

  void finish_row(int64_t row) {
    const float lse = at(row).lse();
    if (!args_.lse.empty()) args_.lse.as<float>()[begin_ + row] = lse;
    args_.nll.as<float>()[begin_ + row] = target(row) < 0 ? 0.0f : lse - at(row).target;
  }

  void backward() {
    for_each_tile([&](const float* weight, const Tile& tile) {
      form_gradient(tile);
      if (!args_.d_hidden.empty()) add_to_d_hidden(weight, tile);
      if (!args_.d_weight.empty()) add_to_d_weight(tile);
    });
  }

  void form_gradient(const Tile& tile) {
    const auto transform = HWY_DYNAMIC_DISPATCH(logits_to_gradient);
    for_each_row(tile.size, [&](int64_t row) {
      float* g = logits(row, tile);
      if (target(row) < 0) {
        std::fill_n(g, tile.size, 0.0f);
        return;
      }
      transform(g, tile.size, at(row).lse(), scale());
      if (holds(tile, target(row))) g[target(row) - tile.begin] -= scale();
    });
  }

  void add_to_d_hidden(const float* weight, const Tile& tile) {
    gemm(ctx_, {.M = rows_,
                .N = D(),
                .K = tile.size,
                .a = logits(0, tile),
                .lda = width_,
                .b = weight,
                .ldb = D(),
                .beta = tile.begin == 0 ? 0.0f : 1.0f,
                .c = slice_of(args_.d_hidden),
                .ldc = row_stride(args_.d_hidden)});
  }

  void add_to_d_weight(const Tile& tile) {
    gemm(ctx_, {.transpose_a = true,
                .M = tile.size,
                .N = D(),
                .K = rows_,
                .a = logits(0, tile),
                .lda = width_,
                .b = slice_of(args_.hidden),
                .ldb = row_stride(args_.hidden),
                .beta = 1,
                .c = args_.d_weight.as<float>() + tile.begin * D(),
                .ldc = D()});
  }

  Context& ctx_;
  const CrossEntropyArgs& args_;
  ScratchScope scope_;
  int64_t slice_rows_ = 0, width_ = 0;  // logits_ is (slice_rows, width)
  int64_t begin_ = 0, rows_ = 0;        // the slice at hand
  std::span<float> logits_;
  std::span<Row> rows_of_slice_;
};

}  // namespace

void cross_entropy(Context& ctx, const CrossEntropyArgs& args) {
  CrossEntropy(ctx, args).run();
}

}  // namespace mamba3::cpu
#endif  // HWY_ONCE
