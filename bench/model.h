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
  Device device = Device::cpu;
  // Of the matrices, and on the GPU of the activations. On the CPU training is in f32.
  DType dtype = DType::bf16;
  std::string state_dtype = "f32";  // of the recurrent state
  int64_t tokens = 2048;            // of a prompt, or of a sequence in training
  int64_t batch = 1;                // sequences
  int threads = 0;
};

// A model with random weights:
//   model_prefill  prompts, read together as generate_batch() does, to the logits of their last
//                  tokens
//   model_decode   one greedy token after a short prompt
//   model_train    forward, loss, backward and update of one batch
// FLOPs: 2 for each weight of a matrix that a token meets (6 in training), and those of the chunked
// scan (three times in training). Bytes of a decode step: the weights, and the states twice.
// Throws InputError for an unknown mode.
std::vector<Benchmark> model_benchmarks(const ModelSettings& settings);

}  // namespace mamba3::bench
