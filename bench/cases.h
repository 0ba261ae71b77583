#pragma once

#include <fmt/format.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "ops/mixer.h"

// The one table of cases that tests and benchmarks share. An op has a struct of what a case can
// vary and a function that lists its cases: a base row, then rows that each vary one thing. The
// base is the caller's: tests give one that the slow references can follow, benchmarks that of a
// published model, which is the default of the struct (187m-siso, a prompt of 2048 tokens).
namespace mamba3::bench {

template <typename Case>
struct NamedCase {
  std::string name;  // what it varies
  Case value;
};

template <typename Case>
struct Variation {
  const char* name;
  void (*apply)(Case& value);
};

template <typename Case>
std::vector<NamedCase<Case>> vary(const Case& base,
                                  std::initializer_list<Variation<Case>> variations) {
  std::vector<NamedCase<Case>> cases{{"base", base}};
  for (const Variation<Case>& variation : variations) {
    cases.push_back({variation.name, base});
    variation.apply(cases.back().value);
  }
  return cases;
}

// Rows of x that are strided have this many unused elements behind them.
inline constexpr int64_t kRowGap = 5;

struct LinearCase {
  int64_t M = 2048, N = 3072, K = 768;
  DType dtype = DType::f32;  // of the weight
  bool bias = false, accumulate = false, strided = false;

  std::string shape() const { return fmt::format("M={} N={} K={} {}", M, N, K, name_of(dtype)); }
};

inline std::vector<NamedCase<LinearCase>> linear_cases(const LinearCase& base = {}) {
  using Case = LinearCase;
  return vary<Case>(base, {
                              {"bf16", [](Case& c) { c.dtype = DType::bf16; }},
                              {"f16", [](Case& c) { c.dtype = DType::f16; }},
                              {"bias", [](Case& c) { c.bias = true; }},
                              {"accumulate", [](Case& c) { c.accumulate = true; }},
                              {"strided", [](Case& c) { c.strided = true; }},
                              {"wide", [](Case& c) { c.N *= 8; }},
                              {"deep", [](Case& c) { c.K *= 2; }},
                              {"odd", [](Case& c) { --c.M, --c.N, --c.K; }},
                              {"prompt of 64", [](Case& c) { c.M = 64; }},
                              {"prompt of 16", [](Case& c) { c.M = 16; }},
                          });
}

// Decoding: a few rows of x, bound by reading the weight.
inline std::vector<NamedCase<LinearCase>> linear_decode_cases(const LinearCase& base = {
                                                                  .M = 1, .dtype = DType::bf16}) {
  using Case = LinearCase;
  return vary<Case>(base, {
                              {"f32", [](Case& c) { c.dtype = DType::f32; }},
                              {"f16", [](Case& c) { c.dtype = DType::f16; }},
                              {"2 rows", [](Case& c) { c.M = 2; }},
                              {"3 rows", [](Case& c) { c.M = 3; }},
                              {"4 rows", [](Case& c) { c.M = 4; }},
                              {"8 rows", [](Case& c) { c.M = 8; }},
                              {"bias", [](Case& c) { c.bias = true; }},
                              {"accumulate", [](Case& c) { c.accumulate = true; }},
                              {"strided", [](Case& c) { c.M = 2, c.strided = true; }},
                              {"deep", [](Case& c) { c.K *= 2; }},
                              {"odd", [](Case& c) { --c.N, --c.K; }},
                              {"head", [](Case& c) { c.N *= 40; }},
                          });
}

struct AttentionCase {
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

inline std::vector<NamedCase<AttentionCase>> attention_cases(const AttentionCase& base = {}) {
  using Case = AttentionCase;
  return vary<Case>(base, {
                              {"batch", [](Case& c) { c.B = 3; }},
                              {"longer", [](Case& c) { c.T *= 2; }},
                              {"odd", [](Case& c) { --c.T, --c.d; }},
                              {"one token", [](Case& c) { c.T = 1; }},
                              {"no groups", [](Case& c) { c.Hkv = c.Hq; }},
                              {"one key head", [](Case& c) { c.Hkv = 1; }},
                              {"wide heads", [](Case& c) { c.d *= 2; }},
                              {"packed", [](Case& c) { c.packed = 3; }},
                          });
}

// One token a sequence.
inline std::vector<NamedCase<AttentionCase>> attention_step_cases(const AttentionCase& base = {
                                                                      .T = 1, .past = 2047}) {
  using Case = AttentionCase;
  return vary<Case>(base, {
                              {"batch", [](Case& c) { c.B = 8; }},
                              {"longer", [](Case& c) { c.past *= 4; }},
                              {"first token", [](Case& c) { c.past = 0; }},
                              {"odd", [](Case& c) { --c.d; }},
                              {"no groups", [](Case& c) { c.Hkv = c.Hq; }},
                              {"one key head", [](Case& c) { c.Hkv = 1; }},
                          });
}

}  // namespace mamba3::bench
