#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "ops/delta.h"
#include "ops/mixer.h"

// The one table of cases that tests and benchmarks share. An op has a struct of what a case can
// vary and a function that lists its cases: a base row, then rows that each vary one thing. The
// base is the caller's: tests give one that the slow references can follow, benchmarks take the
// struct's defaults, which are those of a published model (187m-siso, a prompt of 2048 tokens).
namespace mamba3::bench {

template <typename Case>
struct Variation {
  const char* name;  // letters, digits and underscores, as GoogleTest wants them
  void (*change)(Case& value);
};

template <typename Case>
std::vector<Case> vary(const Case& base, std::initializer_list<Variation<Case>> variations) {
  std::vector<Case> cases{base};
  for (const Variation<Case>& variation : variations) {
    cases.push_back(base);
    cases.back().name = variation.name;
    variation.change(cases.back());
  }
  return cases;
}

// Rows that are strided have this many unused elements behind them.
inline constexpr int64_t kRowGap = 5;

struct LinearCase {
  std::string name = "base";
  int64_t M = 2048, N = 3072, K = 768;
  DType dtype = DType::f32;  // of the weight
  bool bias = false, accumulate = false, strided = false;

  std::string shape() const { return fmt::format("M={} N={} K={} {}", M, N, K, name_of(dtype)); }
};

inline std::vector<LinearCase> linear_cases(const LinearCase& base = {}) {
  return vary<LinearCase>(base, {
                                    {"bf16", [](auto& c) { c.dtype = DType::bf16; }},
                                    {"f16", [](auto& c) { c.dtype = DType::f16; }},
                                    {"bias", [](auto& c) { c.bias = true; }},
                                    {"accumulate", [](auto& c) { c.accumulate = true; }},
                                    {"strided", [](auto& c) { c.strided = true; }},
                                    {"wide", [](auto& c) { c.N *= 8; }},
                                    {"deep", [](auto& c) { c.K *= 2; }},
                                    {"odd", [](auto& c) { --c.M, --c.N, --c.K; }},
                                    {"M64", [](auto& c) { c.M = 64; }},
                                    {"M16", [](auto& c) { c.M = 16; }},
                                });
}

// Decoding: a few rows of x, bound by reading the weight.
inline std::vector<LinearCase> linear_decode_cases(const LinearCase& base = {
                                                       .M = 1, .dtype = DType::bf16}) {
  return vary<LinearCase>(base, {
                                    {"f32", [](auto& c) { c.dtype = DType::f32; }},
                                    {"f16", [](auto& c) { c.dtype = DType::f16; }},
                                    {"M2", [](auto& c) { c.M = 2; }},
                                    {"M3", [](auto& c) { c.M = 3; }},
                                    {"M4", [](auto& c) { c.M = 4; }},
                                    {"M8", [](auto& c) { c.M = 8; }},
                                    {"bias", [](auto& c) { c.bias = true; }},
                                    {"accumulate", [](auto& c) { c.accumulate = true; }},
                                    {"strided", [](auto& c) { c.M = 2, c.strided = true; }},
                                    {"deep", [](auto& c) { c.K *= 2; }},
                                    {"odd", [](auto& c) { --c.N, --c.K; }},
                                    {"head", [](auto& c) { c.N *= 40; }},  // lm_head has many rows
                                });
}

struct AttentionCase {
  std::string name = "base";
  int64_t B = 1, T = 2048, Hq = 12, Hkv = 4, d = 64;
  int64_t past = 0;    // tokens in the cache
  int64_t packed = 0;  // sequences in the one batch row; 0: not packed

  std::string shape() const {
    std::string text = fmt::format("B={} T={} Hq={} Hkv={} d={}", B, T, Hq, Hkv, d);
    if (past > 0) text += fmt::format(" past={}", past);
    if (packed > 0) text += fmt::format(" packed={}", packed);
    return text;
  }
};

inline std::vector<AttentionCase> attention_cases(const AttentionCase& base = {}) {
  return vary<AttentionCase>(base, {
                                       {"B3", [](auto& c) { c.B = 3; }},
                                       {"long", [](auto& c) { c.T *= 2; }},
                                       {"odd", [](auto& c) { --c.T, --c.d; }},
                                       {"T1", [](auto& c) { c.T = 1; }},
                                       {"no_groups", [](auto& c) { c.Hkv = c.Hq; }},
                                       {"one_key_head", [](auto& c) { c.Hkv = 1; }},
                                       {"wide", [](auto& c) { c.d *= 2; }},
                                       {"packed", [](auto& c) { c.packed = 3; }},
                                   });
}

// One token a sequence.
inline std::vector<AttentionCase> attention_step_cases(const AttentionCase& base = {.T = 1,
                                                                                    .past = 2047}) {
  return vary<AttentionCase>(base, {
                                       {"B8", [](auto& c) { c.B = 8; }},
                                       {"long", [](auto& c) { c.past *= 4; }},
                                       {"first", [](auto& c) { c.past = 0; }},
                                       {"odd", [](auto& c) { --c.d; }},
                                       {"no_groups", [](auto& c) { c.Hkv = c.Hq; }},
                                       {"one_key_head", [](auto& c) { c.Hkv = 1; }},
                                   });
}

struct MixerCase {
  std::string name = "base";
  MixerShape shape{.H = 24, .P = 64, .N = 128, .S = 32};
  int64_t B = 1, T = 2048;

  std::string dims() const {
    const MixerShape& s = shape;
    return fmt::format("B={} T={} H={} P={} N={} G={} R={}", B, T, s.H, s.P, s.N, s.G, s.R);
  }
};

inline std::vector<MixerCase> mixer_cases(const MixerCase& base = {}) {
  std::vector<MixerCase> cases{base};
  const auto add = [&](const std::string& name, auto change) {
    MixerCase row = base;
    row.name = name;
    change(row.shape, row);
    cases.push_back(row);
  };
  const auto mimo = [](MixerShape& s, int64_t R) {
    s.R = R;
    s.mimo = true;
    s.rope_pairs = RopePairs::halves;
  };
  for (const int64_t R : {1, 2, 3, 4, 8}) {
    add(fmt::format("mimo_R{}", R), [&](MixerShape& s, MixerCase&) { mimo(s, R); });
  }
  add("mimo_neighbours", [&](MixerShape& s, MixerCase&) {
    mimo(s, 4);
    s.rope_pairs = RopePairs::neighbours;
  });
  add("mimo_norm_G2_rope_all", [&](MixerShape& s, MixerCase&) {
    mimo(s, 3);
    s.out_norm = true, s.G = 2, s.S = s.N / 2;
  });
  for (const int64_t T : {1, 2, 63, 64, 65, 129}) {
    add(fmt::format("T{}", T), [T](MixerShape&, MixerCase& c) { c.T = T; });
  }
  add("P24", [](MixerShape& s, MixerCase&) { s.P = 24; });
  add("P7", [](MixerShape& s, MixerCase&) { s.P = 7; });
  add("N48", [](MixerShape& s, MixerCase&) { s.N = 48, s.S = 12; });
  add("N16_S4", [](MixerShape& s, MixerCase&) { s.N = 16, s.S = 4; });
  add("N128_P64", [](MixerShape& s, MixerCase&) { s.N = 128, s.P = 64, s.S = 32; });
  add("H3_P24_N16", [](MixerShape& s, MixerCase&) { s.H = 3, s.P = 24, s.N = 16, s.S = 8; });
  add("rope_all", [](MixerShape& s, MixerCase&) { s.S = s.N / 2; });
  add("rope_none", [](MixerShape& s, MixerCase&) { s.S = 0; });
  add("G2", [](MixerShape& s, MixerCase&) { s.G = 2; });
  add("out_norm", [](MixerShape& s, MixerCase&) { s.out_norm = true; });
  add("softplus", [](MixerShape& s, MixerCase&) { s.decay_act = DecayAct::softplus; });
  add("A_floor", [](MixerShape& s, MixerCase&) { s.A_floor = 0.8f; });  // some decays reach it
  // What is not Mamba-3 as published.
  add("rope_standard", [](MixerShape& s, MixerCase&) { s.rope = Rope::standard; });
  add("half", [](MixerShape& s, MixerCase&) { s.discretisation = Discretisation::half; });
  add("euler", [](MixerShape& s, MixerCase&) { s.discretisation = Discretisation::euler; });
  add("constant_A", [](MixerShape& s, MixerCase&) { s.decay_act = DecayAct::constant; });
  add("no_bc_bias", [](MixerShape& s, MixerCase&) { s.bc_bias = false; });
  add("no_bc_norm", [](MixerShape& s, MixerCase&) { s.bc_norm = false; });
  add("mimo_rope_standard_half_no_bias", [&](MixerShape& s, MixerCase&) {
    mimo(s, 2);
    s.rope = Rope::standard, s.discretisation = Discretisation::half, s.bc_bias = false;
  });
  const auto mamba2 = [](MixerShape& s) {
    s.S = 0, s.discretisation = Discretisation::euler, s.decay_act = DecayAct::constant;
    s.bc_norm = s.bc_bias = false;
  };
  add("mamba2", [&](MixerShape& s, MixerCase&) { mamba2(s); });
  add("mamba2_G2_odd", [&](MixerShape& s, MixerCase& c) {
    mamba2(s);
    s.G = 2, s.P = 24, s.N = 20, c.T = 67;
  });
  return cases;
}

// One token a sequence.
inline std::vector<MixerCase> mixer_step_cases(const MixerCase& base = {.T = 1}) {
  return vary<MixerCase>(base, {
                                   {"B8", [](auto& c) { c.B = 8; }},
                                   {"mimo_R4",
                                    [](auto& c) {
                                      c.shape.R = 4, c.shape.mimo = true;
                                      c.shape.rope_pairs = RopePairs::halves;
                                    }},
                                   {"H64", [](auto& c) { c.shape.H = 64; }},
                                   {"G2", [](auto& c) { c.shape.G = 2; }},
                                   {"out_norm", [](auto& c) { c.shape.out_norm = true; }},
                               });
}

struct DeltaCase {
  std::string name = "base";
  DeltaShape shape{.H = 2, .K = 64, .V = 64};  // a small model that learns to track a state
  int64_t B = 256, T = 160;

  std::string dims() const {
    return fmt::format("B={} T={} H={} K={} V={}", B, T, shape.H, shape.K, shape.V);
  }
};

inline std::vector<DeltaCase> delta_cases(const DeltaCase& base = {}) {
  return vary<DeltaCase>(base, {
                                   {"B3", [](auto& c) { c.B = 3; }},
                                   {"long", [](auto& c) { c.B = 1, c.T *= 8; }},
                                   {"H6", [](auto& c) { c.shape.H = 6; }},
                                   {"wide", [](auto& c) { c.shape.K *= 2, c.shape.V *= 2; }},
                                   {"K_above_V", [](auto& c) { c.shape.K *= 2; }},
                                   {"odd", [](auto& c) { c.shape.K = 5, c.shape.V = 3, c.T = 17; }},
                                   {"T1", [](auto& c) { c.T = 1; }},
                                   {"negative", [](auto& c) { c.shape.negative = true; }},
                               });
}

// One token a sequence.
inline std::vector<DeltaCase> delta_step_cases(const DeltaCase& base = {.T = 1}) {
  return vary<DeltaCase>(base, {
                                   {"B8", [](auto& c) { c.B = 8; }},
                                   {"wide", [](auto& c) { c.shape.K *= 2, c.shape.V *= 2; }},
                               });
}

struct RmsNormCase {
  std::string name = "base";
  int64_t M = 2048, D = 768;
  bool delta = true;  // with the residual add

  std::string shape() const { return fmt::format("M={} D={}", M, D); }
};

inline std::vector<RmsNormCase> rms_norm_cases(const RmsNormCase& base = {}) {
  return vary<RmsNormCase>(base, {
                                     {"no_delta", [](auto& c) { c.delta = false; }},
                                     {"M1", [](auto& c) { c.M = 1; }},
                                     {"wide", [](auto& c) { c.D *= 4; }},
                                     {"odd", [](auto& c) { --c.M, --c.D; }},
                                 });
}

struct GroupedRmsNormCase {
  std::string name = "base";
  int64_t M = 2048, C = 1536, groups = 1;

  std::string shape() const { return fmt::format("M={} C={} groups={}", M, C, groups); }
};

inline std::vector<GroupedRmsNormCase> grouped_rms_norm_cases(const GroupedRmsNormCase& base = {}) {
  return vary<GroupedRmsNormCase>(base, {
                                            {"groups8", [](auto& c) { c.groups = 8; }},
                                            {"heads", [](auto& c) { c.groups = c.C / 64; }},
                                            {"M1", [](auto& c) { c.M = 1; }},
                                            {"wide", [](auto& c) { c.C *= 4; }},
                                            {"odd", [](auto& c) { --c.M, --c.C; }},
                                        });
}

struct SwigluCase {
  std::string name = "base";
  int64_t M = 2048, F = 1536;

  std::string shape() const { return fmt::format("M={} F={}", M, F); }
};

inline std::vector<SwigluCase> swiglu_cases(const SwigluCase& base = {}) {
  return vary<SwigluCase>(base, {
                                    {"M1", [](auto& c) { c.M = 1; }},
                                    {"wide", [](auto& c) { c.F *= 4; }},
                                    {"odd", [](auto& c) { --c.M, --c.F; }},
                                });
}

// The first product of an MLP in a decode step.
struct LinearSwigluCase {
  std::string name = "base";
  int64_t M = 1, F = 1536, K = 768;

  std::string shape() const { return fmt::format("M={} F={} K={}", M, F, K); }
};

inline std::vector<LinearSwigluCase> linear_swiglu_cases(const LinearSwigluCase& base = {}) {
  return vary<LinearSwigluCase>(base, {
                                          {"M8", [](auto& c) { c.M = 8; }},
                                          {"M64", [](auto& c) { c.M = 64; }},
                                          {"large", [](auto& c) { c.F = 3824, c.K = 2048; }},
                                          {"odd", [](auto& c) { --c.F, --c.K; }},
                                      });
}

// Of a Mamba-2 layer of the base's size: the channels are x, B and C of [z, x, B, C, dt].
struct ShortConvCase {
  std::string name = "base";
  int64_t B = 1, T = 2048, first = 1536, C = 1792, X = 3352, W = 4;
  bool bias = true;
  bool state = false;

  std::string shape() const { return fmt::format("B={} T={} C={} of {} W={}", B, T, C, X, W); }
};

inline std::vector<ShortConvCase> short_conv_cases(const ShortConvCase& base = {}) {
  return vary<ShortConvCase>(base, {
                                       {"B8", [](auto& c) { c.B = 8; }},
                                       {"T1", [](auto& c) { c.T = 1; }},
                                       {"T2", [](auto& c) { c.T = 2; }},
                                       {"W2", [](auto& c) { c.W = 2; }},
                                       {"W3", [](auto& c) { c.W = 3; }},
                                       {"W5", [](auto& c) { c.W = 5; }},
                                       {"W6", [](auto& c) { c.W = 6; }},
                                       {"W7", [](auto& c) { c.W = 7; }},
                                       {"W8", [](auto& c) { c.W = 8; }},
                                       {"no_bias", [](auto& c) { c.bias = false; }},
                                       {"all_columns", [](auto& c) { c.first = 0, c.X = c.C; }},
                                       {"odd", [](auto& c) { --c.first, --c.C, --c.X; }},
                                   });
}

// One token a sequence.
inline std::vector<ShortConvCase> short_conv_step_cases(const ShortConvCase& base = {
                                                            .T = 1, .state = true}) {
  return vary<ShortConvCase>(base, {
                                       {"B8", [](auto& c) { c.B = 8; }},
                                       {"B128", [](auto& c) { c.B = 128; }},
                                   });
}

// Heads of queries and keys together.
struct RotaryCase {
  std::string name = "base";
  int64_t B = 1, T = 2048, heads = 16, d = 64, dims = 64;

  std::string shape() const {
    return fmt::format("B={} T={} heads={} d={} dims={}", B, T, heads, d, dims);
  }
};

inline std::vector<RotaryCase> rotary_cases(const RotaryCase& base = {}) {
  return vary<RotaryCase>(base, {
                                    {"B8", [](auto& c) { c.B = 8; }},
                                    {"T1", [](auto& c) { c.T = 1; }},
                                    {"part", [](auto& c) { c.dims /= 2; }},
                                    {"odd", [](auto& c) { --c.T, --c.d, c.dims -= 2; }},
                                    {"one_pair", [](auto& c) { c.dims = 2; }},
                                    {"wide", [](auto& c) { c.d *= 5, c.dims *= 5; }},
                                });
}

struct EmbeddingCase {
  std::string name = "base";
  int64_t M = 2048, V = 128256, D = 768;
  DType dtype = DType::f32;  // of the weight

  std::string shape() const { return fmt::format("M={} V={} D={} {}", M, V, D, name_of(dtype)); }
};

inline std::vector<EmbeddingCase> embedding_cases(const EmbeddingCase& base = {}) {
  return vary<EmbeddingCase>(base, {
                                       {"bf16", [](auto& c) { c.dtype = DType::bf16; }},
                                       {"f16", [](auto& c) { c.dtype = DType::f16; }},
                                       {"M1", [](auto& c) { c.M = 1; }},
                                       {"odd", [](auto& c) { --c.M, --c.V, --c.D; }},
                                   });
}

struct CrossEntropyCase {
  std::string name = "base";
  int64_t M = 256, V = 128256, D = 768;  // 256 tokens: the rest of a prompt costs the same again
  int64_t padding = 0;                   // rows of V that do not take part
  DType dtype = DType::f32;              // of the weight
  bool gradient = true;

  std::string shape() const {
    return fmt::format("M={} V={} D={} {}{}", M, V, D, name_of(dtype), gradient ? "" : " loss");
  }
};

inline std::vector<CrossEntropyCase> cross_entropy_cases(const CrossEntropyCase& base = {}) {
  return vary<CrossEntropyCase>(base, {
                                          {"bf16", [](auto& c) { c.dtype = DType::bf16; }},
                                          {"loss", [](auto& c) { c.gradient = false; }},
                                          {"padded", [](auto& c) { c.padding = c.V / 7; }},
                                          {"M1", [](auto& c) { c.M = 1; }},
                                          {"odd", [](auto& c) { --c.M, --c.V, --c.D; }},
                                      });
}

struct AdamwCase {
  std::string name = "base";
  int64_t tensors = 12, elements = 1 << 20;  // each
  float clip = 1.0f;

  std::string shape() const { return fmt::format("{} x {}", tensors, elements); }
};

inline std::vector<AdamwCase> adamw_cases(const AdamwCase& base = {}) {
  return vary<AdamwCase>(base, {
                                   {"no_clip", [](auto& c) { c.clip = 0; }},
                                   {"one", [](auto& c) { c.tensors = 1; }},
                                   {"odd", [](auto& c) { --c.elements; }},
                               });
}

struct SampleCase {
  std::string name = "base";
  int64_t B = 1, V = 128256;
  float temperature = 0.8f, top_p = 0.95f, min_p = 0.05f, repeat_penalty = 1.1f;
  int32_t top_k = 40;

  std::string shape() const { return fmt::format("B={} V={} top_k={}", B, V, top_k); }
};

inline std::vector<SampleCase> sample_cases(const SampleCase& base = {}) {
  return vary<SampleCase>(base, {
                                    {"greedy", [](auto& c) { c.temperature = 0; }},
                                    {"no_top_k", [](auto& c) { c.top_k = 0; }},
                                    {"B8", [](auto& c) { c.B = 8; }},
                                });
}

}  // namespace mamba3::bench
