// The scan on the GPU's tensor cores (cuda/mixer_tiles.cuh), which takes bf16 in rows that begin at
// multiples of 16 bytes. The rows of the other tests of the scan do not, so that those test the
// kernels that take every shape.

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <optional>

#include "ops/mixer_scan.h"
#include "ops/mixer_step.h"
#include "support/compare.h"
#include "support/complex_step.h"
#include "support/device.h"
#include "support/mixer.h"

namespace mamba3::testing {
namespace {

struct TileCase {
  std::string name = "base";
  MixerShape shape{.H = 4, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  int64_t B = 1, T = 131;
  // Added to all, which are around 0. As in trained models, so that states outlast a chunk; with 0
  // they are halved by a token.
  double dt_bias = -4;
  double dd_A = std::nan("");  // of every token; NaN: around 0
  int64_t heads_in_turn = 0;   // MixerScanBackwardArgs::heads

  int64_t heads() const { return B * T * shape.H; }  // of all tokens
};

void PrintTo(const TileCase& row, std::ostream* out) {
  *out << row.name;
}

std::vector<TileCase> tile_cases() {
  std::vector<TileCase> cases{TileCase{}};
  const auto add = [&](const std::string& name, auto change) {
    TileCase row;
    row.name = name;
    change(row, row.shape);
    cases.push_back(row);
  };
  add("N64_S16", [](TileCase&, MixerShape& s) { s.N = 64, s.S = 16; });
  add("P128", [](TileCase&, MixerShape& s) { s.H = 2, s.P = 128; });
  add("rope_all", [](TileCase&, MixerShape& s) { s.S = s.N / 2; });
  add("N64_rope_all", [](TileCase&, MixerShape& s) { s.N = 64, s.S = 32; });
  add("rope_none", [](TileCase&, MixerShape& s) { s.S = 0; });
  add("N64_rope_none_P192",
      [](TileCase&, MixerShape& s) { s.H = 1, s.P = 192, s.N = 64, s.S = 0; });
  add("G2", [](TileCase&, MixerShape& s) { s.G = 2; });
  add("out_norm", [](TileCase&, MixerShape& s) { s.out_norm = true; });
  add("softplus", [](TileCase&, MixerShape& s) { s.decay_act = DecayAct::softplus; });
  add("A_floor", [](TileCase&, MixerShape& s) { s.A_floor = 0.8f; });  // some decays reach it
  for (const int64_t T : {1, 2, 63, 64, 65, 128, 300}) {
    add("T" + std::to_string(T), [T](TileCase& c, MixerShape&) { c.T = T; });
  }
  add("T1000_H2", [](TileCase& c, MixerShape& s) { c.T = 1000, s.H = 2; });
  add("B2", [](TileCase& c, MixerShape&) { c.B = 2; });
  add("B3_T65", [](TileCase& c, MixerShape&) { c.B = 3, c.T = 65; });
  // More heads than kernels take at a time, and blocks enough for a GPU: one span a sequence.
  add("B3_H70_N64_T129",
      [](TileCase& c, MixerShape& s) { c.B = 3, c.T = 129, s.H = 70, s.N = 64, s.S = 16; });
  add("large_steps", [](TileCase& c, MixerShape&) { c.dt_bias = 0; });
  add("large_steps_T300", [](TileCase& c, MixerShape&) { c.dt_bias = 0, c.T = 300; });
  add("strong_decay", [](TileCase& c, MixerShape&) { c.dt_bias = 0, c.dd_A = 30; });
  add("decay_near_one", [](TileCase& c, MixerShape&) { c.dt_bias = 0, c.dd_A = -1e6; });
  const auto mimo = [&](const std::string& name, int64_t R, auto change) {
    add("mimo_" + name, [&](TileCase& c, MixerShape& s) {
      s.R = R, s.mimo = true, s.rope_pairs = RopePairs::halves;
      change(c, s);
    });
  };
  mimo("R4", 4, [](TileCase&, MixerShape&) {});
  mimo("R2", 2, [](TileCase&, MixerShape&) {});
  mimo("R8", 8, [](TileCase&, MixerShape&) {});
  mimo("R4_rope_all", 4, [](TileCase&, MixerShape& s) { s.S = 64; });
  mimo("R2_N64_S16", 2, [](TileCase&, MixerShape& s) { s.N = 64, s.S = 16; });
  mimo("R4_N64_S16", 4, [](TileCase&, MixerShape& s) { s.N = 64, s.S = 16; });
  mimo("R8_N64_rope_all", 8, [](TileCase&, MixerShape& s) { s.N = 64, s.S = 32; });
  mimo("R4_P128", 4, [](TileCase&, MixerShape& s) { s.H = 2, s.P = 128; });
  mimo("R4_G2", 4, [](TileCase&, MixerShape& s) { s.G = 2; });
  mimo("R4_out_norm", 4, [](TileCase&, MixerShape& s) { s.out_norm = true; });
  for (const int64_t T : {1, 15, 16, 17, 33}) {
    mimo("R4_T" + std::to_string(T), 4, [T](TileCase& c, MixerShape&) { c.T = T; });
  }
  mimo("R2_T65", 2, [](TileCase& c, MixerShape&) { c.T = 65; });
  mimo("R8_T9", 8, [](TileCase& c, MixerShape&) { c.T = 9; });
  mimo("R4_B3_T35", 4, [](TileCase& c, MixerShape&) { c.B = 3, c.T = 35; });
  mimo("R2_B3_H70_N64_T129", 2,
       [](TileCase& c, MixerShape& s) { c.B = 3, c.T = 129, s.H = 70, s.N = 64, s.S = 16; });
  mimo("R4_large_steps", 4, [](TileCase& c, MixerShape&) { c.dt_bias = 0; });
  mimo("R4_strong_decay", 4, [](TileCase& c, MixerShape&) { c.dt_bias = 0, c.dd_A = 30; });
  mimo("R4_decay_near_one", 4, [](TileCase& c, MixerShape&) { c.dt_bias = 0, c.dd_A = -1e6; });
  return cases;
}

// The backward has no tiles for an output norm.
std::vector<TileCase> backward_cases() {
  std::vector<TileCase> cases = tile_cases();
  std::erase_if(cases, [](const TileCase& row) { return row.shape.out_norm; });
  for (const auto& [name, heads] : {std::pair{"base", 2},
                                    {"T65", 4},
                                    {"N64_S16", 4},
                                    {"P128", 4},
                                    {"rope_all", 2},
                                    {"rope_none", 4},
                                    {"G2", 2},
                                    {"mimo_R4", 2},
                                    {"mimo_R4_T33", 4},
                                    {"mimo_R8", 4},
                                    {"mimo_R2_N64_S16", 4},
                                    {"mimo_R4_P128", 4},
                                    {"mimo_R4_rope_all", 2}}) {
    TileCase row = *std::ranges::find(cases, name, &TileCase::name);
    row.name += "_" + std::to_string(heads) + "_heads";
    row.heads_in_turn = heads;
    cases.push_back(row);
  }
  return cases;
}

std::string case_name(const ::testing::TestParamInfo<TileCase>& row) {
  return row.param.name;
}

#define ONLY_ON_THE_GPU() \
  if (test_device() == Device::cpu) GTEST_SKIP() << "tensor cores: MAMBA3_TEST_DEVICE=cuda"

// Behind a row, so that the next one begins at a multiple of 16 bytes; never nothing, so that a
// write or a read there shows.
int64_t gap_after(int64_t columns) {
  return 8 + (8 - columns % 8) % 8;
}
Tensor normal_rows(Random& random, int64_t B, int64_t T, int64_t columns) {
  return Tensor::normal(random, {B, T, columns}, 1, DType::bf16, gap_after(columns));
}
Tensor empty_rows(int64_t B, int64_t T, int64_t columns) {
  return Tensor({B, T, columns}, DType::bf16, gap_after(columns));
}
Tensor in_f32(const Tensor& rows) {
  const View& view = rows.host();
  return Tensor::of({view.dim(0), view.dim(1), view.dim(2)}, values_of(view));
}

struct Inputs {
  TileCase row;
  Random random;
  MixerParamTensors params;
  Tensor proj;

  Inputs(const TileCase& tile_case, uint64_t seed)
      : row(tile_case),
        random(seed),
        params(random, row.shape),
        proj(normal_rows(random, row.B, row.T, row.shape.d_proj())) {
    const MixerShape& s = row.shape;
    for (int64_t h = 0; h < s.H; ++h) params.dt_bias.set(h, params.dt_bias.at(h) + row.dt_bias);
    // A norm makes rows that nearly cancel, whose errors are as large as any, as large as the
    // others. With a skip of some size there are none.
    for (int64_t h = 0; h < s.H && s.out_norm; ++h) {
      params.D.set(h, params.D.at(h) + (params.D.at(h) < 0 ? -2 : 2));
    }
    if (std::isnan(row.dd_A)) return;
    for (int64_t i = 0; i < row.B * row.T * s.H; ++i) {
      proj.set(i / s.H * s.d_proj() + s.dd_A() + i % s.H, row.dd_A);
    }
  }

  Tensor outputs() const { return empty_rows(row.B, row.T, row.shape.d_inner()); }
  MixerScanArgs args(const View& y, const MixerState& state = {}) const {
    EXPECT_TRUE(mixer_scan_has_tiles(row.shape, proj, y, 0));
    return {.shape = row.shape,
            .params = params.views(row.shape),
            .proj = proj,
            .y = y,
            .cu_seqlens = {},
            .state = state};
  }
};

// Rounding to bf16 changes a number by up to 2^-8 of it, by 1.5e-3 at the root of the mean square.
// An output goes through about five roundings that have nothing to do with each other: of the key,
// of the query, of the weight or of the value times its decay, of the state, and of itself. So
// norms are off by sqrt(5) 1.5e-3 = 3.4e-3, and by a little more where terms cancel. (A simulation
// that rounds where the kernels do gives up to 4.0e-3 for these cases, and 2.4e-3 for states, which
// have two roundings.) MIMO rounds one thing more, the value of a rank.
//
// Errors are normal, and a row is as large as its gate, step, key and query make it: several times
// the mean of the head for some, where an element may still be small. So single elements are given
// sqrt(5) 5e-2, and rows of a head sqrt(5) 1.2e-2, of their size and the mean (the simulation: 6e-2
// and 2e-2 at most). What is wrong is off by about 1.
constexpr double kOutputNorm = 4.5e-3, kStateNorm = 4e-3;
Tolerance output_bound(const MixerShape& s, double factor) {
  return {.unit = 5e-2 * factor, .terms = s.mimo ? 6.0 : 5.0, .tile_norm = 0.25};
}

// Where few rows are summed, one that by chance nearly cancels has more than its share of the
// error.
double norm_bound(int64_t heads) {
  return heads < 64 ? 2 * kOutputNorm : kOutputNorm;
}

// y (B, T, H P) against another, head by head, since heads differ in size.
void expect_outputs(const Tensor& y, std::span<const double> want, const MixerShape& s,
                    double factor = 1) {
  const View got = y.host();
  const auto rows = static_cast<size_t>(got.dim(0) * got.dim(1));
  const auto P = static_cast<size_t>(s.P), width = static_cast<size_t>(s.d_inner());
  ASSERT_EQ(want.size(), rows * width);
  EXPECT_LT(relative_norm(got, want),
            norm_bound(static_cast<int64_t>(rows) * s.H) * std::sqrt(factor));
  for (int64_t h = 0; h < s.H; ++h) {
    std::vector<double> of_head;
    for (size_t i = 0; i < rows; ++i) {
      const auto from = want.subspan(i * width + static_cast<size_t>(h) * P, P);
      of_head.insert(of_head.end(), from.begin(), from.end());
    }
    EXPECT_TRUE(near(got.slice(2, h * s.P, (h + 1) * s.P), of_head, output_bound(s, factor)))
        << "head " << h;
  }
}

// What is f32 throughout: an angle is the sum of a step a token.
Tolerance exact_bound(const MixerShape& s, int64_t T) {
  return {.unit = 5e-6, .terms = static_cast<double>(s.N + T)};
}

void expect_state(const MixerStateTensors& got, int64_t sequence,
                  const ref::MixerState<double>& want, const MixerShape& s, int64_t T,
                  double factor = 1) {
  const auto row = static_cast<int64_t>(got.rows.at(sequence));
  const View ssm = got.ssm.host().select(0, row);
  const size_t head = want.ssm.size() / static_cast<size_t>(s.H);
  for (int64_t h = 0; h < s.H; ++h) {
    const auto of_head = std::span(want.ssm).subspan(static_cast<size_t>(h) * head, head);
    EXPECT_LT(relative_norm(ssm.select(0, h), of_head), kStateNorm * std::sqrt(factor))
        << "head " << h;
  }
  Tolerance exact = exact_bound(s, T);
  exact.unit *= factor;
  EXPECT_TRUE(near(got.k_prev.host().select(0, row), want.k_prev, exact));
  EXPECT_TRUE(near(got.v_prev.host().select(0, row), want.v_prev, {.unit = 1e-7}));
  if (s.S == 0) return;
  const double angle_bound = factor * 3e-5 * std::max(1.0, std::sqrt(static_cast<double>(T) / 100));
  const auto angle = values_of(got.angle.host().select(0, row));
  for (size_t i = 0; i < angle.size(); ++i) {
    EXPECT_NEAR(wrapped(angle[i] - want.angle[i]), 0, angle_bound) << "angle " << i;
  }
}

double relative_error(const Tensor& got, const Tensor& want) {
  return relative_norm(got, want.values());
}

class MixerScanTiles : public ::testing::TestWithParam<TileCase> {
  void SetUp() override { ONLY_ON_THE_GPU(); }

 protected:
  Context ctx_ = make_context(2);
};

INSTANTIATE_TEST_SUITE_P(Shapes, MixerScanTiles, ::testing::ValuesIn(tile_cases()), case_name);

TEST_P(MixerScanTiles, EqualsTheReference) {
  const TileCase& row = GetParam();
  for (const DType ssm_dtype : {DType::f32, DType::bf16}) {
    Inputs in(row, 1);
    const Tensor y = in.outputs();
    const MixerStateTensors state(in.random, row.shape, row.B, 1, ssm_dtype);
    auto states = reference_states(state, row.B);
    const auto want = reference_scan(row.shape, in.params, in.proj, states);
    mixer_scan(ctx_, in.args(y, state.views()));
    expect_outputs(y, want, row.shape);
    for (int64_t b = 0; b < row.B; ++b) {
      expect_state(state, b, states[static_cast<size_t>(b)], row.shape, row.T);
    }
    // Only this path rounds keys to bf16. A state as good as f32 would be of another one.
    const auto first = static_cast<int64_t>(state.rows.at(0));
    EXPECT_GT(relative_norm(state.ssm.host().select(0, first), states[0].ssm), 1e-5);
  }
}

TEST_P(MixerScanTiles, EqualsTheReferenceWithoutStates) {
  const TileCase& row = GetParam();
  const Inputs in(row, 2);
  const Tensor y = in.outputs(), same = in.outputs();
  std::vector<ref::MixerState<double>> states(static_cast<size_t>(row.B),
                                              ref::MixerState<double>::zero(row.shape));
  const auto want = reference_scan(row.shape, in.params, in.proj, states);
  MixerScanArgs args = in.args(y);
  mixer_scan(ctx_, args);
  expect_outputs(y, want, row.shape);
  args.y = same, args.chunk = 64 / row.shape.R;  // which is what it has
  mixer_scan(ctx_, args);
  EXPECT_TRUE(same_bits(same, y));
}

TEST_P(MixerScanTiles, TwoScansEqualOne) {
  const TileCase& row = GetParam();
  const Inputs in(row, 3);
  const Tensor y = in.outputs(), parts = in.outputs();
  Random same_a(4), same_b(4);
  const MixerStateTensors state(same_a, row.shape, row.B), continued(same_b, row.shape, row.B);
  mixer_scan(ctx_, in.args(y, state.views()));
  const int64_t cut = row.T / 3;
  for (const auto& [from, to] : {std::pair{int64_t{0}, cut}, std::pair{cut, row.T}}) {
    MixerScanArgs args = in.args(parts.view().slice(1, from, to), continued.views());
    args.proj = in.proj.view().slice(1, from, to);
    EXPECT_TRUE(mixer_scan_has_tiles(row.shape, args.proj, args.y, 0));
    mixer_scan(ctx_, args);
  }
  expect_outputs(parts, y.values(), row.shape, 2);
  for (int64_t b = 0; b < row.B; ++b) {
    expect_state(continued, b, state.reference<double>(b), row.shape, row.T, 2);
  }
}

TEST_P(MixerScanTiles, PackedSequencesEqualSeparateOnes) {
  TileCase row = GetParam();
  row.B = 1;
  const Inputs in(row, 5);
  // An empty one, one of one token (where T allows), and the rest.
  const auto end = static_cast<int32_t>(row.T), cut = end / 4, next = std::min(cut + 1, end);
  const std::array cuts{0, cut, cut, next, end};
  const Tensor cu = Tensor::of_ids({0, cut, cut, next, end});
  const Tensor y = in.outputs(), separate = in.outputs();
  Random same_a(6), same_b(6);
  const MixerStateTensors packed(same_a, row.shape, 4), alone(same_b, row.shape, 4);
  MixerScanArgs args = in.args(y, packed.views());
  args.cu_seqlens = cu;
  mixer_scan(ctx_, args);
  for (size_t i = 0; i < 4; ++i) {
    const int64_t from = cuts[i], to = cuts[i + 1];
    if (from == to) continue;
    args = in.args(separate.view().slice(1, from, to), alone.views());
    args.proj = in.proj.view().slice(1, from, to);
    args.state.rows =
        args.state.rows.slice(0, static_cast<int64_t>(i), static_cast<int64_t>(i) + 1);
    mixer_scan(ctx_, args);
  }
  // Not to the bit: they may be cut into other spans.
  expect_outputs(y, separate.values(), row.shape, 2);
  for (int64_t i = 0; i < 4; ++i) {
    expect_state(packed, i, alone.reference<double>(i), row.shape, row.T, 2);
  }
  const auto empty = static_cast<int64_t>(packed.rows.at(1));
  EXPECT_TRUE(same_bits(packed.ssm.host().select(0, empty), alone.ssm.host().select(0, empty)));
}

TEST_P(MixerScanTiles, GivesTheSameBitsTwice) {
  const TileCase& row = GetParam();
  const Inputs in(row, 7);
  const Tensor y = in.outputs(), again = in.outputs();
  Random same_a(8), same_b(8);
  const MixerStateTensors state(same_a, row.shape, row.B), second(same_b, row.shape, row.B);
  mixer_scan(ctx_, in.args(y, state.views()));
  mixer_scan(ctx_, in.args(again, second.views()));
  EXPECT_TRUE(same_bits(again, y));
  EXPECT_TRUE(same_bits(second.ssm, state.ssm));
  EXPECT_TRUE(same_bits(second.k_prev, state.k_prev));
  EXPECT_TRUE(same_bits(second.v_prev, state.v_prev));
  if (row.shape.S == 0) return;
  EXPECT_TRUE(same_bits(second.angle, state.angle));
}

// Against the kernels that take every shape, in f32, where the reference would take long: `cuts`
// are those of a packed batch, or none.
void equals_f32(Context& ctx, const TileCase& row, const std::vector<int32_t>& cuts,
                bool with_states) {
  const MixerShape& s = row.shape;
  const Inputs in(row, 9);
  const Tensor proj = in_f32(in.proj), y = in.outputs(), y_f32({row.B, row.T, s.d_inner()});
  const int64_t sequences = cuts.empty() ? row.B : std::ssize(cuts) - 1;
  Random same_a(10), same_b(10);
  const int64_t pool_rows = with_states ? sequences : 1;
  const MixerStateTensors state(same_a, s, pool_rows), state_f32(same_b, s, pool_rows);
  Tensor cu({std::max<int64_t>(std::ssize(cuts), 1)}, DType::i32);
  for (size_t i = 0; i < cuts.size(); ++i) cu.set(static_cast<int64_t>(i), cuts[i]);
  MixerScanArgs args = in.args(y, with_states ? state.views() : MixerState{});
  if (!cuts.empty()) args.cu_seqlens = cu;
  mixer_scan(ctx, args);
  args.proj = proj, args.y = y_f32, args.chunk = 32;
  if (with_states) args.state = state_f32.views();
  EXPECT_FALSE(mixer_scan_has_tiles(s, args.proj, args.y, args.chunk));
  mixer_scan(ctx, args);
  expect_outputs(y, y_f32.values(), s);
  for (int64_t i = 0; i < sequences && with_states; ++i) {
    expect_state(state, i, state_f32.reference<double>(i), s, row.T, 2);
  }
}

class MixerScanTilesLong : public ::testing::Test {
  void SetUp() override { ONLY_ON_THE_GPU(); }

 protected:
  Context ctx_ = make_context(2);
  // Blocks that an H100 has at a time.
  static constexpr int64_t kSlots = 264;
};

TEST_F(MixerScanTilesLong, SeveralSpansOfASequence) {
  for (const double dt_bias : {0, -4}) {
    const TileCase row{.shape = {.H = 2, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32},
                       .B = 2,
                       .T = 2017,
                       .dt_bias = dt_bias};
    EXPECT_LT(mixer_scan_span(64, 32, 2, kSlots), 16);  // of 32 chunks
    for (const bool with_states : {false, true}) equals_f32(ctx_, row, {}, with_states);
  }
}

// Of rank 4, heads of 128 channels and two groups.
MixerShape mimo_shape() {
  return {.H = 2,
          .P = 128,
          .N = 128,
          .G = 2,
          .R = 4,
          .S = 32,
          .mimo = true,
          .rope_pairs = RopePairs::halves};
}

TEST_F(MixerScanTilesLong, SeveralSpansOfMimo) {
  const TileCase row{.shape = mimo_shape(), .B = 2, .T = 517, .dt_bias = -4};
  for (const bool with_states : {false, true}) equals_f32(ctx_, row, {}, with_states);
  const std::vector<int32_t> cuts{0, 1, 1, 200, 216, 233, 233, 516, 517, 517};
  TileCase packed = row;
  packed.B = 1;
  for (const bool with_states : {false, true}) equals_f32(ctx_, packed, cuts, with_states);
}

TEST_F(MixerScanTilesLong, SeveralSpansOfPackedSequences) {
  const TileCase row{
      .shape = {.H = 2, .P = 128, .N = 64, .G = 2, .R = 1, .S = 16}, .T = 2100, .dt_bias = -4};
  const std::vector<int32_t> cuts{0, 1, 1, 700, 700, 764, 829, 829, 2099, 2100, 2100};
  for (const bool with_states : {false, true}) equals_f32(ctx_, row, cuts, with_states);
}

// More than there are threads to list them.
TEST_F(MixerScanTilesLong, ManyShortSequences) {
  const TileCase row{.shape = {.H = 1, .P = 64, .N = 64, .G = 1, .R = 1, .S = 16}, .T = 3000};
  Random random(11);
  std::vector<int32_t> cuts{0};
  while (cuts.back() + 80 < row.T || cuts.size() < 1500) {
    const int64_t length = cuts.size() % 300 == 0 ? 80 : random.integer(0, 4);
    cuts.push_back(std::min(cuts.back() + static_cast<int32_t>(length), 3000));
  }
  cuts.push_back(3000);
  EXPECT_GT(cuts.size(), 1200u);
  equals_f32(ctx_, row, cuts, false);
}

// Decays from none to total, which overflow if exp(c_t) and exp(-c_s) are formed apart.
TEST_F(MixerScanTilesLong, StrongAndWeakDecayStayFinite) {
  Inputs in({}, 12);
  const MixerShape& s = in.row.shape;
  for (int64_t i = 0; i < in.row.T * s.H; ++i) {
    const int64_t t = i / s.H, h = i % s.H;
    const double raw[] = {300, -1e6, 0, 30};
    in.proj.set(t * s.d_proj() + s.dd_A() + h, raw[h]);
    in.proj.set(t * s.d_proj() + s.dd_dt() + h, h == 1 ? -9.0 : 5.0);
  }
  const Tensor y = in.outputs();
  std::vector states{ref::MixerState<double>::zero(s)};
  const auto want = reference_scan(s, in.params, in.proj, states);
  mixer_scan(ctx_, in.args(y));
  expect_outputs(y, want, s);
}

// What a scan leaves is what steps go on from.
void steps_go_on(Context& ctx, const TileCase& row) {
  const MixerShape& s = row.shape;
  constexpr int64_t kScanned = 66;
  Inputs in(row, 13);
  const Tensor y = in.outputs();
  const MixerStateTensors state(in.random, s, row.B);
  auto states = reference_states(state, row.B);
  const auto want = reference_scan(s, in.params, in.proj, states);
  MixerScanArgs args = in.args(y.view().slice(1, 0, kScanned), state.views());
  args.proj = in.proj.view().slice(1, 0, kScanned);
  mixer_scan(ctx, args);
  for (int64_t t = kScanned; t < row.T; ++t) {
    mixer_step(ctx, {.shape = s,
                     .params = in.params.views(s),
                     .proj = in.proj.view().select(1, t),
                     .y = y.view().select(1, t),
                     .state = state.views()});
  }
  expect_outputs(y, want, s);
  for (int64_t b = 0; b < row.B; ++b) {
    expect_state(state, b, states[static_cast<size_t>(b)], s, row.T);
  }
}
TEST_F(MixerScanTilesLong, StepsGoOnFromAScan) {
  steps_go_on(ctx_, {.B = 2, .T = 70});
  steps_go_on(ctx_, {.shape = mimo_shape(), .B = 2, .T = 70});
}

TEST_F(MixerScanTilesLong, ASecondCallAllocatesNothing) {
  const Inputs in({.T = 300}, 14);
  const Tensor y = in.outputs();
  mixer_scan(ctx_, in.args(y));
  const int64_t before = ctx_.scratch.allocations();
  mixer_scan(ctx_, in.args(y));
  EXPECT_EQ(ctx_.scratch.allocations(), before);
}

// The backward.

// Without the output norm.
std::vector<std::pair<std::string, const Tensor*>> named_params(const MixerParamTensors& params,
                                                                bool mimo) {
  std::vector<std::pair<std::string, const Tensor*>> named{
      {"dt_bias", &params.dt_bias}, {"B_bias", &params.B_bias}, {"C_bias", &params.C_bias},
      {"B_norm", &params.B_norm},   {"C_norm", &params.C_norm}, {"D", &params.D}};
  if (mimo) {
    named.insert(
        named.end(),
        {{"mimo_x", &params.mimo_x}, {"mimo_z", &params.mimo_z}, {"mimo_o", &params.mimo_o}});
  }
  return named;
}

struct Gradients {
  Tensor proj;
  MixerParamTensors params;
  bool mimo;
  std::optional<MixerStateTensors> state;  // that of the final one before, of the initial one after

  Gradients(const TileCase& row, DType dtype)
      : proj({row.B, row.T, row.shape.d_proj()}, dtype,
             dtype == DType::bf16 ? gap_after(row.shape.d_proj()) : 0),
        params(row.shape),
        mimo(row.shape.mimo) {}

  std::vector<std::pair<std::string, const Tensor*>> of_params() const {
    return named_params(params, mimo);
  }
};

// Columns of a projection, and how far the norm of their gradient may be off. The relative errors
// of the kernels of the model's authors, on the same inputs, are as large or larger. An angle's
// gradient is a small difference between what its key and its query get.
struct Part {
  std::string name;
  int64_t from, to;
  double bound;
};
std::vector<Part> parts_of(const MixerShape& s) {
  return {{"z", s.z(), s.x(), 5e-3},
          {"x", s.x(), s.B(), 5e-3},
          {"B", s.B(), s.C(), 1e-2},
          {"C", s.C(), s.dd_dt(), 1e-2},
          {"dd_dt", s.dd_dt(), s.dd_A(), 1e-2},
          {"dd_A", s.dd_A(), s.trap(), 1e-2},
          {"trap", s.trap(), s.angle(), 1e-2},
          {"angle", s.angle(), s.d_proj(), 4e-2}};
}
constexpr double kParamBound = 1e-2;

double norm_of(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

struct Problem {
  Inputs in;
  Tensor d_y;
  int64_t states = 0;  // as many sequences go on from `initial`, if it is there, ..
  std::optional<MixerStateTensors> initial;
  bool with_d_state = false;  // .. and their final states have gradients

  Problem(const TileCase& row, uint64_t seed)
      : in(row, seed), d_y(normal_rows(in.random, row.B, row.T, row.shape.d_inner())) {}

  void add_states(int64_t sequences, bool at_start = true, bool at_end = true) {
    states = sequences;
    Random random(35);
    if (at_start) initial.emplace(random, in.row.shape, sequences, 0.5);
    with_d_state = at_end;
  }

  // On tiles.
  Gradients gradients(Context& ctx, const View& cu_seqlens = {}) const {
    Gradients d = empty_gradients(DType::bf16);
    backward(ctx, d, cu_seqlens);
    return d;
  }
  void backward(Context& ctx, const Gradients& d, const View& cu_seqlens = {}) const {
    EXPECT_TRUE(mixer_scan_has_tiles(in.row.shape, in.proj, d_y, 0));
    EXPECT_TRUE(mixer_scan_has_tiles(in.row.shape, d.proj, d_y, 0));
    mixer_scan_backward(ctx, args(in.proj, d_y, d, cu_seqlens));
  }
  // By the kernels that take every shape, in f32.
  Gradients gradients_in_f32(Context& ctx, const View& cu_seqlens = {}) const {
    return gradients_in_f32(ctx, cu_seqlens, in_f32(in.proj), in_f32(d_y));
  }
  Gradients gradients_in_f32(Context& ctx, const View& cu_seqlens, const View& proj,
                             const View& d_outputs) const {
    Gradients d = empty_gradients(DType::f32);
    auto with_chunks = args(proj, d_outputs, d, cu_seqlens);
    with_chunks.chunk = 32;
    mixer_scan_backward(ctx, with_chunks);
    return d;
  }
  MixerScanBackwardArgs args(const View& proj, const View& d_outputs, const Gradients& d,
                             const View& cu_seqlens) const {
    return {.shape = in.row.shape,
            .params = in.params.views(in.row.shape),
            .proj = proj,
            .cu_seqlens = cu_seqlens,
            .initial = initial ? initial->views() : MixerState{},
            .d_y = d_outputs,
            .d_proj = d.proj,
            .d_params = d.params.views(in.row.shape),
            .d_state = d.state ? d.state->views() : MixerState{},
            .heads = in.row.heads_in_turn};
  }

 private:
  Gradients empty_gradients(DType dtype) const {
    Gradients d(in.row, dtype);
    Random random(36);
    if (with_d_state) d.state.emplace(random, in.row.shape, states);
    return d;
  }
};

// What is compared: columns of d_proj, and the gradients of parameters.
struct Piece {
  std::string name;
  double bound;
  std::vector<double> values;
  bool is_param = false;
};
std::vector<Piece> pieces_of(const Gradients& d, const MixerShape& s) {
  std::vector<Piece> pieces;
  const View proj = d.proj.host();
  for (const Part& part : parts_of(s)) {
    if (part.from == part.to) continue;
    pieces.push_back({part.name, part.bound, values_of(proj.slice(2, part.from, part.to))});
  }
  for (const auto& [name, tensor] : d.of_params()) {
    pieces.push_back({name, kParamBound, tensor->values(), true});
  }
  if (d.state) {
    pieces.push_back({"ssm", kParamBound, d.state->ssm.values(), true});
    pieces.push_back({"k_prev", kParamBound, d.state->k_prev.values(), true});
    pieces.push_back({"v_prev", kParamBound, d.state->v_prev.values(), true});
    if (s.S > 0) pieces.push_back({"initial angle", 4e-2, d.state->angle.values(), true});
  }
  return pieces;
}
double distance(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// How far rounding moves each piece, by measurement: by how much it changes, in f32, where x, B, C
// and d_y are off by independent relative errors. A bound of the result is not enough where terms
// cancel: dt_bias and D are a few sums over all tokens of terms of either sign, and with one token,
// a head's z, x and trap hang on the one number D + gamma q.k. Their errors are those of the terms
// and remain where the sum is near 0; this has the size of the terms.
//
// The kernels round other values, by 1.5e-3 each: the key, the query, weights, values or gradients
// times their decay, states and their gradients, and the result, seven at most; MIMO's two more,
// the value and the gradient of a rank. Four errors of 2e-3 (MIMO: 2.25e-3) are as much. A key is
// the sum of B, normed, and of a bias about as large, which does not move: so B and C are off by
// sqrt(2) times that. Where nothing cancels, norms then change by up to 4e-3, and those of the
// kernels are off by about 3e-3: there the bounds of the parts are what counts.
std::vector<double> rounding_errors(Context& ctx, const Problem& problem, const View& cu_seqlens,
                                    const Gradients& want) {
  const MixerShape& s = problem.in.row.shape;
  const int draws = problem.in.row.heads() < 1 << 14 ? 8 : 1;
  const double input_error = s.mimo ? 2.25e-3 : 2e-3;
  const auto pieces = pieces_of(want, s);
  std::vector<double> squares(pieces.size());
  Random random(34);
  const auto with_errors = [&](const Tensor& rows, const auto& error_of_column) {
    const View& view = rows.host();
    std::vector<double> values = values_of(view);
    for (int64_t i = 0; i < std::ssize(values); ++i) {
      const double error = error_of_column(i % view.dim(2));
      if (error > 0) values[static_cast<size_t>(i)] *= 1 + error * random.normal();
    }
    return Tensor::of({view.dim(0), view.dim(1), view.dim(2)}, values);
  };
  const auto of_proj = [&](int64_t column) {
    if (column < s.x() || column >= s.dd_dt()) return 0.0;
    return column < s.B() ? input_error : std::numbers::sqrt2 * input_error;
  };
  for (int draw = 0; draw < draws; ++draw) {
    const Tensor proj = with_errors(problem.in.proj, of_proj);
    const Tensor d_y = with_errors(problem.d_y, [&](int64_t) { return input_error; });
    const auto moved = pieces_of(problem.gradients_in_f32(ctx, cu_seqlens, proj, d_y), s);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const double change = distance(moved[i].values, pieces[i].values);
      squares[i] += change * change / draws;
    }
  }
  for (double& square : squares) square = std::sqrt(square);
  return squares;
}

// The error of the angles' gradients that comes from chunks. A pair of a key and a later query
// turns the angles of the tokens between them alone: those up to the key get it twice, of either
// sign. In a chunk both are made of the same rounded numbers and cancel. Across the end of one, the
// query's is made of the rounded state and the key's of its rounded gradient, and what they differ
// by is in the gradient of every token before. Where tokens forget at once, that is most of it: a
// pair counts only at a token of a small step, which makes its own gradient small, and its error is
// times the large steps of the others.
//
// Errors are relative to the terms that enter, and independent, so squares add up, and those of the
// pairs are a scan of squares. Four roundings make a difference: of the values times their decay,
// of the state, and of both of their gradients.
struct SquaredToken {
  double dt, decay, scale;  // the last two are squares
  // Squares: (R, P) values and gated gradients, (R, S) norms of pairs.
  std::vector<double> x, d, k, q;
};
SquaredToken squared_token(const MixerShape& s, const ref::MixerParams<double>& params, int64_t h,
                           const double* proj, const double* d_y, double carry) {
  const auto square = [](double value) { return value * value; };
  SquaredToken token;
  token.dt = ref::softplus(proj[s.dd_dt() + h] + params.dt_bias[static_cast<size_t>(h)]);
  const double A = ref::decay_act(s.decay_act, proj[s.dd_A() + h]);
  token.decay = std::exp(-2 * std::max<double>(A, s.A_floor) * token.dt);
  token.scale = square(ref::sigmoid(proj[s.trap() + h]) * token.dt + carry);
  for (int64_t r = 0; r < s.R; ++r) {
    for (int64_t p = h * s.P; p < (h + 1) * s.P; ++p) {
      const auto i = static_cast<size_t>((h * s.R + r) * s.P + p - h * s.P);
      const auto of = [&](const std::vector<double>& factors) { return s.mimo ? factors[i] : 1; };
      token.x.push_back(square(proj[s.x() + p] * of(params.mimo_x)));
      const double gate = ref::silu(proj[s.z() + p] * of(params.mimo_z));
      token.d.push_back(square(d_y[p] * of(params.mimo_o) * gate));
    }
  }
  const auto pairs = [&](int64_t from, const auto& weight, const auto& bias) {
    std::vector<double> squares;
    for (int64_t r = 0; r < s.R; ++r) {
      const double* row = proj + from + (r * s.G + h / (s.H / s.G)) * s.N;
      const auto channels = ref::normed(row, weight.data(), s.N, s.eps);
      const auto of = [&](int64_t n) {
        const auto i = static_cast<size_t>(n);
        return square(channels[i] + bias[static_cast<size_t>((h * s.R + r) * s.N) + i]);
      };
      const bool halves = s.rope_pairs == RopePairs::halves;
      for (int64_t i = 0; i < s.S; ++i) {
        squares.push_back(halves ? of(i) + of(i + s.N / 2) : of(2 * i) + of(2 * i + 1));
      }
    }
    return squares;
  };
  token.k = pairs(s.B(), params.B_norm, params.B_bias);
  token.q = pairs(s.C(), params.C_norm, params.C_bias);
  return token;
}

// A step turns by its angles too, so that dt_bias, a sum over all steps, has an error for each end
// of a chunk, the same in all steps before it.
struct ChunkErrors {
  double angle, dt_bias;
};
ChunkErrors errors_across_chunks(const Problem& problem, const std::vector<int32_t>& cuts) {
  constexpr double kRounding = 1.5e-3;
  const MixerShape& s = problem.in.row.shape;
  const int64_t kChunk = 64 / s.R;
  const auto params = problem.in.params.reference<double>();
  const auto proj = problem.in.proj.values(), d_y = problem.d_y.values();
  using Matrix = std::vector<double>;  // (P, S)
  const auto P = static_cast<size_t>(s.P), S = static_cast<size_t>(s.S);
  // The sum over the ranks of rows (R, P) times columns (R, S).
  const auto add = [&](Matrix& to, const auto& rows, const auto& columns, double factor) {
    for (size_t i = 0; i < rows.size(); ++i) {
      for (size_t j = 0; j < S; ++j) {
        to[i % P * S + j] += factor * rows[i] * columns[i / P * S + j];
      }
    }
  };
  const auto decay = [](Matrix& matrix, double factor) {
    for (double& value : matrix) value *= factor;
  };
  ChunkErrors sums{};  // of squares
  const auto add_sequence = [&](int64_t from, int64_t n, int64_t h) {
    const auto proj_at = [&](int64_t t) { return proj.data() + (from + t) * s.d_proj(); };
    std::vector<SquaredToken> tokens;
    double carry = 0;  // of the next token
    for (int64_t t = n - 1; t >= 0; --t) {
      const double* in = proj_at(t);
      tokens.push_back(
          squared_token(s, params, h, in, d_y.data() + (from + t) * s.d_inner(), carry));
      carry = (1 - ref::sigmoid(in[s.trap() + h])) * tokens.back().dt;
    }
    std::ranges::reverse(tokens);
    Matrix state(static_cast<size_t>(s.P * s.S)), gradient = state;
    std::vector<Matrix> states;                 // before each chunk
    std::vector<std::vector<double>> of_steps;  // what dt_bias has of an angle's gradient there
    std::vector<double> of_step(S);
    for (size_t t = 0; t < tokens.size(); ++t) {
      if (t % static_cast<size_t>(kChunk) == 0) {
        states.push_back(state);
        of_steps.push_back(of_step);
      }
      const double* in = proj_at(static_cast<int64_t>(t));
      const double raw = in[s.dd_dt() + h] + params.dt_bias[static_cast<size_t>(h)];
      for (size_t i = 0; i < S; ++i) {
        of_step[i] += ref::sigmoid(raw) * std::numbers::pi * std::tanh((in + s.angle())[i]);
      }
      decay(state, tokens[t].decay);
      add(state, tokens[t].x, tokens[t].k, tokens[t].scale);
    }
    std::vector<double> later(static_cast<size_t>(s.S));  // pairs across later ends of chunks
    for (int64_t t = n - 1; t >= 0; --t) {
      const SquaredToken& token = tokens[static_cast<size_t>(t)];
      for (size_t i = 0; i < later.size(); ++i) {
        const double tanh = std::tanh((proj_at(t) + s.angle())[i]);
        const double slope = std::numbers::pi * (1 - tanh * tanh) * token.dt;
        sums.angle += slope * slope * later[i];
      }
      add(gradient, token.d, token.q, 1);
      decay(gradient, token.decay);
      if (t % kChunk > 0) continue;
      const auto chunk = static_cast<size_t>(t / kChunk);
      const Matrix& before = states[chunk];
      for (size_t j = 0; j < before.size(); ++j) {
        const double pair = before[j] * gradient[j] / 2;  // the mean of a square of a sine
        later[j % S] += pair;
        sums.dt_bias += of_steps[chunk][j % S] * of_steps[chunk][j % S] * pair;
      }
    }
  };
  for (size_t i = 0; i + 1 < cuts.size(); ++i) {
    const int64_t n = cuts[i + 1] - cuts[i];
    for (int64_t h = 0; h < s.H && s.S > 0 && n > kChunk; ++h) add_sequence(cuts[i], n, h);
  }
  return {kRounding * std::sqrt(4 * sums.angle), kRounding * std::sqrt(4 * sums.dt_bias)};
}

// `rounding`: of each piece, what rounding may move it by at any rate.
void expect_gradients(const Gradients& got, const Gradients& want, const TileCase& row,
                      std::span<const double> rounding = {}) {
  const auto pieces = pieces_of(got, row.shape), pieces_want = pieces_of(want, row.shape);
  const double mean =
      norm_of(want.proj.values()) / std::sqrt(static_cast<double>(want.proj.host().size()));
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto& [name, bound, values, is_param] = pieces_want[i];
    const double norm = norm_of(values), error = distance(pieces[i].values, values);
    // Some gradients are 0, and then they are rounding errors of what cancels: those of A and of
    // the angle where there is one token, or of an A at its floor.
    const double least = 0.01 * mean * std::sqrt(static_cast<double>(values.size()));
    double most = bound * std::max(norm, is_param ? 0 : least);
    // As for outputs: few numbers may all have more than their share of the error.
    const bool few = row.heads() < 64 || values.size() < 64;
    if (!rounding.empty()) most = std::max(most, (few ? 2 : 1) * rounding[i]);
    EXPECT_LE(error, most) << name << ", relative error " << error / norm;
  }
}

// Tiles against f32, of a batch or (cuts of) packed sequences.
void expect_gradients_of_f32(Context& ctx, const Problem& problem,
                             const std::vector<int32_t>& cuts = {}) {
  const TileCase& row = problem.in.row;
  Tensor cu({std::max<int64_t>(std::ssize(cuts), 1)}, DType::i32);
  for (size_t i = 0; i < cuts.size(); ++i) cu.set(static_cast<int64_t>(i), cuts[i]);
  const View packed = cuts.empty() ? View{} : cu.view();
  const Gradients want = problem.gradients_in_f32(ctx, packed);
  auto rounding = rounding_errors(ctx, problem, packed, want);
  std::vector<int32_t> ends = cuts;
  for (int64_t b = 0; b <= row.B && cuts.empty(); ++b) {
    ends.push_back(static_cast<int32_t>(b * row.T));
  }
  const ChunkErrors across = errors_across_chunks(problem, ends);
  const auto pieces = pieces_of(want, row.shape);
  for (size_t i = 0; i < pieces.size(); ++i) {
    // A few values and states are behind most of an angle's: twice that, as where numbers are few.
    if (pieces[i].name == "angle") rounding[i] = std::max(rounding[i], 2 * across.angle);
    if (pieces[i].name == "dt_bias") rounding[i] = std::hypot(rounding[i], across.dt_bias);
  }
  expect_gradients(problem.gradients(ctx, packed), want, row, rounding);
}

class MixerScanTilesBackward : public ::testing::TestWithParam<TileCase> {
  void SetUp() override { ONLY_ON_THE_GPU(); }

 protected:
  // Equal to what the other path gives, but not by way of it.
  void equals_that_in_f32(const Problem& problem) {
    expect_gradients_of_f32(ctx_, problem);
    const Gradients got = problem.gradients(ctx_), want = problem.gradients_in_f32(ctx_);
    // Only this path rounds queries to bf16; the other one sums f32 in another order.
    EXPECT_GT(relative_error(got.params.B_bias, want.params.B_bias), 1e-5) << "not on tensor cores";
  }

  Context ctx_ = make_context(2);
};

INSTANTIATE_TEST_SUITE_P(Shapes, MixerScanTilesBackward, ::testing::ValuesIn(backward_cases()),
                         case_name);

TEST_P(MixerScanTilesBackward, EqualsThatInF32) {
  equals_that_in_f32(Problem(GetParam(), 20));
}

TEST_P(MixerScanTilesBackward, WithStatesEqualsThatInF32) {
  Problem problem(GetParam(), 28);
  problem.add_states(GetParam().B);
  equals_that_in_f32(problem);
}

// y dotted with fixed weights, as a function of proj and named_params() in one vector.
struct Loss {
  const TileCase& row;
  std::vector<double> d_y;

  template <typename T>
  T operator()(const std::vector<T>& values) const {
    const MixerShape& s = row.shape;
    const T* at = values.data();
    const auto take = [&](int64_t n) {
      at += n;
      return std::vector<T>(at - n, at);
    };
    const auto proj = take(row.B * row.T * s.d_proj());
    ref::MixerParams<T> params;
    params.dt_bias = take(s.H), params.B_bias = take(s.H * s.R * s.N);
    params.C_bias = take(s.H * s.R * s.N);
    params.B_norm = take(s.N), params.C_norm = take(s.N), params.D = take(s.H);
    if (s.mimo) {
      const int64_t ranks = s.H * s.R * s.P;
      params.mimo_x = take(ranks), params.mimo_z = take(ranks), params.mimo_o = take(ranks);
    }
    std::vector<T> y(d_y.size());
    for (int64_t b = 0; b < row.B; ++b) {
      auto state = ref::MixerState<T>::zero(s);
      ref::mixer_scan(s, params, proj.data() + b * row.T * s.d_proj(), row.T, state,
                      y.data() + b * row.T * s.d_inner());
    }
    return dot(d_y, y);
  }
};

// Directional derivatives: along everything, and for some shapes along each part alone, in which a
// wrong part cannot hide behind a large one. The derivative along a direction of normal numbers is
// off by about the norm of the gradient's error.
TEST_P(MixerScanTilesBackward, EqualsTheComplexStepInRandomDirections) {
  TileCase row = GetParam();
  if (row.heads() > 600) GTEST_SKIP() << "the reference would take long";
  const MixerShape& s = row.shape;
  const Problem problem(row, 21);
  const Gradients d = problem.gradients(ctx_);
  // A segment of the vector of all inputs: its gradient, and what its norm may be off.
  struct Segment {
    std::string name;
    std::vector<size_t> positions;
    double bound;
  };
  std::vector<double> point = problem.in.proj.values(), gradient = d.proj.values();
  std::vector<Segment> segments;
  for (const Part& part : parts_of(s)) {
    Segment segment{part.name, {}, part.bound};
    for (int64_t t = 0; t < row.B * row.T; ++t) {
      for (int64_t i = part.from; i < part.to; ++i) {
        segment.positions.push_back(static_cast<size_t>(t * s.d_proj() + i));
      }
    }
    segments.push_back(segment);
  }
  const auto inputs = named_params(problem.in.params, s.mimo), gradients = d.of_params();
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto values = inputs[i].second->values(), more = gradients[i].second->values();
    Segment segment{gradients[i].first, {}, kParamBound};
    for (size_t j = 0; j < values.size(); ++j) segment.positions.push_back(point.size() + j);
    segments.push_back(segment);
    point.insert(point.end(), values.begin(), values.end());
    gradient.insert(gradient.end(), more.begin(), more.end());
  }
  const Loss loss{row, problem.d_y.values()};
  Random random(22);
  const auto expect_slope = [&](std::span<const Segment> along) {
    auto stepped = to_complex(point);
    double got = 0, square = 0;
    std::string names;
    for (const Segment& segment : along) {
      double norm = 0;
      for (const size_t i : segment.positions) {
        const double step = random.normal();
        stepped[i].imag(step * ref::kComplexStep);
        got += gradient[i] * step;
        norm += gradient[i] * gradient[i];
      }
      square += norm * segment.bound * segment.bound;
      names += " " + segment.name;
    }
    const double want = std::imag(loss(stepped)) / ref::kComplexStep;
    EXPECT_NEAR(got, want, 2 * std::sqrt(square)) << "along" << names;
  };
  expect_slope(segments);
  const bool each = row.name == "base" || row.name == "N64_S16" || row.name == "P128" ||
                    row.name == "mimo_R2_N64_S16" || row.name == "mimo_R4_T33" ||
                    row.name == "mimo_R8";
  for (size_t i = 0; i < segments.size() && each; ++i) expect_slope({&segments[i], 1});
}

TEST_P(MixerScanTilesBackward, GivesTheSameBitsTwice) {
  const Problem problem(GetParam(), 23);
  const Gradients first = problem.gradients(ctx_), second = problem.gradients(ctx_);
  EXPECT_TRUE(same_bits(second.proj, first.proj));
  const auto params = first.of_params();
  for (size_t i = 0; i < params.size(); ++i) {
    const auto& [name, tensor] = params[i];
    EXPECT_TRUE(same_bits(*second.of_params()[i].second, *tensor)) << name;
  }
}

TEST_P(MixerScanTilesBackward, OfPackedSequencesEqualsThatInF32) {
  TileCase row = GetParam();
  row.B = 1;
  const Problem problem(row, 24);
  const auto end = static_cast<int32_t>(row.T), cut = end / 4, next = std::min(cut + 1, end);
  expect_gradients_of_f32(ctx_, problem, {0, cut, cut, next, end});
}

class MixerScanTilesBackwardLong : public MixerScanTilesLong {};

TEST_F(MixerScanTilesBackwardLong, SeveralSpansOfASequence) {
  for (const double dt_bias : {0, -4}) {
    const TileCase row{.shape = {.H = 4, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32},
                       .B = 2,
                       .T = 1517,
                       .dt_bias = dt_bias};
    Problem problem(row, 25);
    if (dt_bias < 0) problem.add_states(row.B);
    expect_gradients_of_f32(ctx_, problem);
  }
}

TEST_F(MixerScanTilesBackwardLong, OfMimo) {
  TileCase row{.shape = mimo_shape(), .B = 2, .T = 400, .dt_bias = -4};
  expect_gradients_of_f32(ctx_, Problem(row, 25));
  row.B = 1;
  Problem packed(row, 26);
  const std::vector<int32_t> cuts{0, 1, 1, 200, 216, 233, 233, 399, 400, 400};
  expect_gradients_of_f32(ctx_, packed, cuts);
  packed.add_states(std::ssize(cuts) - 1);
  expect_gradients_of_f32(ctx_, packed, cuts);
}

TEST_F(MixerScanTilesBackwardLong, AStateAtOneEnd) {
  for (const bool mimo : {false, true}) {
    TileCase row{.B = 2, .T = 70};
    if (mimo) row.shape = mimo_shape();
    Problem problem(row, 37);
    problem.add_states(row.B, /*at_start=*/true, /*at_end=*/false);
    expect_gradients_of_f32(ctx_, problem);
    Problem other(row, 38);
    other.add_states(row.B, /*at_start=*/false, /*at_end=*/true);
    expect_gradients_of_f32(ctx_, other);
  }
}

TEST_F(MixerScanTilesBackwardLong, PackedSequences) {
  const TileCase row{
      .shape = {.H = 2, .P = 128, .N = 64, .G = 2, .R = 1, .S = 16}, .T = 2100, .dt_bias = -4};
  Problem problem(row, 26);
  const std::vector<int32_t> cuts{0, 1, 1, 700, 700, 764, 829, 829, 2099, 2100, 2100};
  expect_gradients_of_f32(ctx_, problem, cuts);
  problem.add_states(std::ssize(cuts) - 1);
  expect_gradients_of_f32(ctx_, problem, cuts);
}

// More chunks than it takes at a time: whole sequences, and packed ones, of which a long one begins
// in a segment and ends in the next. Short sequences have a chunk each, so few tokens have many.
TEST_F(MixerScanTilesBackwardLong, SeveralSegments) {
  const MixerShape s{.H = 32, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  const TileCase batch{.shape = s, .B = 1300, .T = 2, .heads_in_turn = 1};
  ASSERT_LE(2 * mixer_scan_tiles_segment(s, 1, batch.B, 1), batch.B);
  {
    const Problem problem(batch, 32);
    expect_gradients_of_f32(ctx_, problem);
  }
  TileCase row{.shape = s, .heads_in_turn = 1};
  const int64_t most = mixer_scan_tiles_segment(s, 1, int64_t{1} << 20, 0);
  std::vector<int32_t> cuts{0};
  int64_t chunks = 0;
  while (chunks < 2 * most + 10) {
    const bool at_the_end = chunks % most == most - 1;  // its first chunk is a segment's last
    cuts.push_back(cuts.back() + (at_the_end ? 150 : 1));
    chunks += at_the_end ? 3 : 1;
  }
  row.T = cuts.back();
  ASSERT_LE(2 * mixer_scan_tiles_segment(s, 1, chunks, 0), chunks);
  expect_gradients_of_f32(ctx_, Problem(row, 33), cuts);
}

// A long sequence in several segments, whose state begins before the first and ends after the last.
// Rank 8 has most chunks for its tokens. With weak decay that many chunks have errors of
// errors_across_chunks() beyond the bounds, 4% in the angle.
TEST_F(MixerScanTilesBackwardLong, StatesOfSeveralSegments) {
  TileCase row{.shape = mimo_shape(), .dd_A = 30};
  row.shape.H = 32, row.shape.N = 64, row.shape.S = 16, row.shape.R = 8;
  row.heads_in_turn = 1;
  const int64_t most = mixer_scan_tiles_segment(row.shape, 1, int64_t{1} << 20, 0);
  const int64_t before = 20;
  row.T = 8 * (most + 10) + before;
  Problem problem(row, 39);
  problem.add_states(2);
  Tensor cu({3}, DType::i32);
  cu.set(0, 0), cu.set(1, before), cu.set(2, static_cast<double>(row.T));
  const Gradients got = problem.gradients(ctx_, cu), want = problem.gradients_in_f32(ctx_, cu);
  const auto pieces = pieces_of(got, row.shape), pieces_want = pieces_of(want, row.shape);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const double norm = norm_of(pieces_want[i].values);
    // Some are left: 0.4% in dt_bias, which is a sum over all tokens.
    const double most_of_norm = (pieces[i].name == "dt_bias" ? 2 : 1) * pieces_want[i].bound;
    EXPECT_LE(distance(pieces[i].values, pieces_want[i].values), most_of_norm * norm)
        << pieces[i].name;
  }
}

TEST_F(MixerScanTilesBackwardLong, ParametersAccumulateAndProjIsOverwritten) {
  const Problem problem({.B = 2, .T = 70}, 27);
  const Gradients once = problem.gradients(ctx_), twice = problem.gradients(ctx_);
  problem.backward(ctx_, twice);
  EXPECT_TRUE(same_bits(twice.proj, once.proj));
  const auto params = once.of_params();
  for (size_t i = 0; i < params.size(); ++i) {
    const auto& [name, tensor] = params[i];
    std::vector<double> want = tensor->values();
    for (double& value : want) value *= 2;
    EXPECT_TRUE(near(*twice.of_params()[i].second, want, {.unit = 1e-6})) << name;
  }
}

// What has no tiles in the backward, in rows that would.
TEST_F(MixerScanTilesBackwardLong, TheOutputNormHasItsGradientToo) {
  TileCase row{.B = 2, .T = 70};
  row.shape.out_norm = true;
  const Problem problem(row, 28);
  const Gradients got = problem.gradients(ctx_), want = problem.gradients_in_f32(ctx_);
  expect_gradients(got, want, row);
  EXPECT_LT(relative_error(got.params.norm, want.params.norm), kParamBound);
}

TEST_F(MixerScanTilesBackwardLong, ASecondCallAllocatesNothing) {
  const Problem problem({.T = 300}, 31);
  const Gradients d = problem.gradients(ctx_);
  const int64_t before = ctx_.scratch.allocations();
  problem.backward(ctx_, d);
  EXPECT_EQ(ctx_.scratch.allocations(), before);
}

// On any device: what decides.

struct Choice {
  MixerShape shape{.H = 4, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  View proj, y;
  int64_t chunk = 0;

  Choice() {
    static char memory[64];  // never read; only where rows begin counts
    void* const start = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 16) % 16;
    proj = make_view(start, DType::bf16, {2, 3, 816});
    proj.dims[2] = shape.d_proj();
    y = make_view(start, DType::bf16, {2, 3, shape.d_inner()});
  }
};

bool has_tiles(void (*change)(Choice&)) {
  Choice choice;
  change(choice);
  return mixer_scan_has_tiles(choice.shape, choice.proj, choice.y, choice.chunk);
}

TEST(MixerScanHasTiles, WhereEachConditionHolds) {
  EXPECT_TRUE(has_tiles([](Choice&) {}));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.chunk = 64; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.S = 0; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.S = 64; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.N = 64, c.shape.S = 16; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.N = 64; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.P = 192; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.G = 2; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.H = 1; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.out_norm = true; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.decay_act = DecayAct::softplus; }));
  EXPECT_TRUE(has_tiles([](Choice& c) { c.shape.A_floor = 0.5f; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.decay_act = DecayAct::constant; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.rope = Rope::standard; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.discretisation = Discretisation::half; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.bc_norm = false; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.bc_bias = false; }));
}

// MIMO of rank R.
MixerShape of_rank(int64_t R) {
  return {.H = 4,
          .P = 64,
          .N = 128,
          .G = 1,
          .R = R,
          .S = 32,
          .mimo = true,
          .rope_pairs = RopePairs::halves};
}

TEST(MixerScanHasTiles, OfMimo) {
  for (const int64_t R : {2, 4, 8}) {
    Choice c;
    const auto has = [&] { return mixer_scan_has_tiles(c.shape, c.proj, c.y, c.chunk); };
    c.shape = of_rank(R);
    EXPECT_TRUE(has());
    c.chunk = 64 / R;
    EXPECT_TRUE(has());
    c.chunk = 64;
    EXPECT_FALSE(has());
    c.chunk = 0, c.shape.S = 64;
    EXPECT_TRUE(has());
    c.shape.S = 0;
    EXPECT_FALSE(has());
    c.shape = of_rank(R), c.shape.rope_pairs = RopePairs::neighbours;
    EXPECT_FALSE(has());
  }
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape = of_rank(1); }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape = of_rank(3); }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape = of_rank(16); }));
}

TEST(MixerScanHasTiles, NotWhereOneDoesNot) {
  EXPECT_FALSE(has_tiles([](Choice& c) { c.proj.dtype = c.y.dtype = DType::f32; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.R = 4; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.mimo = true; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.rope_pairs = RopePairs::halves; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.N = 32, c.shape.S = 8; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.N = 96, c.shape.S = 24; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.N = 256, c.shape.S = 64; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.P = 32; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.P = 96; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.P = 128, c.shape.out_norm = true; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.S = 16; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.shape.S = 48; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.chunk = 32; }));
  EXPECT_FALSE(has_tiles([](Choice& c) { c.chunk = 128; }));
}

TEST(MixerScanHasTiles, OfRowsThatBeginAtMultiplesOf16Bytes) {
  const auto shift = [](View& view) { view.data = static_cast<char*>(view.data) + 2; };
  Choice c;
  const auto has = [&] { return mixer_scan_has_tiles(c.shape, c.proj, c.y, c.chunk); };
  for (View Choice::*rows : {&Choice::proj, &Choice::y}) {
    for (const int axis : {0, 1}) {
      c = {};
      (c.*rows).strides[static_cast<size_t>(axis)] += 4;
      EXPECT_FALSE(has()) << "axis " << axis;
      (c.*rows).dims[static_cast<size_t>(axis)] = 1;  // then there is no next one
      EXPECT_TRUE(has()) << "axis " << axis;
    }
    c = {};
    shift(c.*rows);
    EXPECT_FALSE(has());
  }
}

TEST(MixerScanTilesSegment, IsWholeSequencesWhereTheyFit) {
  const MixerShape s{.H = 32, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  const int64_t most = mixer_scan_tiles_segment(s, 1, 1 << 20, 0);
  EXPECT_GT(most, 100);
  EXPECT_LE(most * s.H * 2 * s.P * s.N * 2, int64_t{5} << 28);
  EXPECT_EQ(mixer_scan_tiles_segment(s, 1, 10, 0), 10);
  EXPECT_EQ(mixer_scan_tiles_segment(s, 1, 10, 5), 10);
  EXPECT_EQ(mixer_scan_tiles_segment(s, 1, 70 * 1000, 70), most / 70 * 70);
  EXPECT_EQ(mixer_scan_tiles_segment(s, 1, 2 * most + 2, most + 1), most);  // a part of one
  EXPECT_EQ(mixer_scan_tiles_segment({.H = 1 << 20, .P = 64, .N = 128, .S = 32}, 1, 9, 3), 1);
}

TEST(MixerScanBackwardHeads, AreSeveralWhereEnoughBlocksAreLeft) {
  const MixerShape s{.H = 24, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 1, 264), 1);
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 32, 264), 1);  // 3 waves of a head, or 2 of two
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 256, 264), 4);
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 44, 264), 4);  // a wave of four
}

TEST(MixerScanBackwardHeads, AreOfOneGroup) {
  MixerShape s{.H = 70, .P = 64, .N = 128, .G = 1, .R = 1, .S = 32};
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 1000, 264), 2);
  s.G = 14;
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 1000, 264), 1);
  EXPECT_EQ(mixer_scan_backward_heads(s, 5, 1, 264), 5);
  EXPECT_EQ(mixer_scan_backward_heads(s, 2, 1, 264), 1);
  s.P = 128;  // two blocks of 64 channels a head
  EXPECT_EQ(mixer_scan_backward_heads(s, 0, 1000, 264), 2);
}

TEST(MixerScanSpan, IsTheSequenceWhereBlocksFillTheGpu) {
  EXPECT_EQ(mixer_scan_span(32, 32, 264, 264), 32);
  EXPECT_EQ(mixer_scan_span(64, 8, 64, 264), 8);
  EXPECT_EQ(mixer_scan_span(32, 32, 5000, 264), 32);
  EXPECT_EQ(mixer_scan_span(1, 1, 1, 264), 1);
}

TEST(MixerScanSpan, IsLessWhereTheyDoNot) {
  EXPECT_LE(mixer_scan_span(32, 32, 4, 264), 4);
  EXPECT_LE(mixer_scan_span(128, 32, 4, 264), 8);  // four sequences
  EXPECT_LT(mixer_scan_span(32, 32, 24, 264), 32);
  // But a second wave of blocks would cost more than it gives.
  EXPECT_LE(32 / mixer_scan_span(32, 32, 24, 264) * 24, 264);
}

TEST(MixerScanSpan, IsAtLeastAChunkAndAtMostTheSequence) {
  for (const int64_t slots : {32, 216, 264, 400}) {
    for (const int64_t blocks : {1, 3, 24, 64, 300}) {
      for (const int64_t chunks : {1, 2, 3, 7, 64, 65, 1000, 16384}) {
        for (const int64_t sequences : {1, 2, 16}) {
          const int64_t span = mixer_scan_span(chunks * sequences, chunks, blocks, slots);
          EXPECT_GE(span, 1);
          EXPECT_LE(span, chunks);
          EXPECT_LE((chunks + span - 1) / span, 64);
        }
        // Of packed sequences only the sum is known.
        const int64_t packed = mixer_scan_span(chunks, 0, blocks, slots);
        EXPECT_GE(packed, 1);
        EXPECT_LE(packed, chunks);
        EXPECT_EQ(packed, mixer_scan_span(chunks, chunks, blocks, slots));
      }
    }
  }
}

}  // namespace
}  // namespace mamba3::testing
