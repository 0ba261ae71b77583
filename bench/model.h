#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bench/measure.h"
#include "model/language_model.h"

namespace mamba3::bench {

struct ModelSettings {
  Config config;
  std::string name;  // of the row: "187m-siso"
  std::vector<std::string> modes{"prefill", "decode", "train"};
  DType dtype = DType::bf16;  // of the weights of prefill and decode; training is in f32
  int64_t tokens = 2048;      // of a prompt, or of a sequence in training
  int64_t batch = 1;          // sequences
  int threads = 0;
};

// A model with random weights:
//   model_prefill  a prompt, to the logits of its last token
//   model_decode   one greedy token after a short prompt
//   model_train    forward, loss, backward and update of one batch
// FLOPs: 2 for each weight of a matrix that a token meets (6 in training), and those of the chunked
// scan (three times in training). Bytes of a decode step: the weights, and the states twice.
// Throws InputError for an unknown mode.
std::vector<Benchmark> model_benchmarks(const ModelSettings& settings);

}  // namespace mamba3::bench
