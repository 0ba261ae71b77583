#include "bench/model.h"

#include <algorithm>
#include <functional>

#include "bench/ops.h"
#include "core/error.h"
#include "core/random.h"
#include "infer/engine.h"
#include "model/init.h"
#include "train/trainer.h"

namespace mamba3::bench {

namespace {

constexpr int64_t kDecodePrompt = 16;

NamedTensors random_parameters(const Config& config, DType dtype, int threads) {
  Context ctx(threads);
  const NamedTensors values = init_parameters(ctx, config, 1);
  if (dtype == DType::f32) return values;
  std::vector<TensorSpec> table = parameter_table(config);
  for (TensorSpec& spec : table) spec.dtype = dtype;
  NamedTensors stored = allocate(table);
  for (const TensorSpec& spec : table) {
    const float* const from = values.at(spec.name).as<float>();
    char* const to = static_cast<char*>(stored.at(spec.name).data);
    ctx.threads.parallel_for(
        stored.at(spec.name).size(), 1 << 16, [&](int64_t begin, int64_t end, int) {
          from_float(from + begin, to + begin * size_of(dtype), dtype, end - begin);
        });
  }
  return stored;
}

// Where and as what the model of the settings is run.
LanguageModel random_model(const ModelSettings& s) {
  const LanguageModel model =
      make_language_model(s.config, random_parameters(s.config, s.dtype, s.threads));
  if (s.device == Device::cpu) return model;
  Context ctx(1, s.device);
  return place_language_model(ctx, model, s.dtype);
}

// The type that products are made in.
DType product_type(const ModelSettings& s) {
  return s.device == Device::cpu ? DType::f32 : s.dtype;
}

std::vector<int32_t> random_ids(const Config& config, int64_t n) {
  Random random(2);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(config.vocab));
  return ids;
}

// Weights that every token is multiplied with in the layers.
double layer_weights(const Config& config) {
  double weights = 0;
  for (const TensorSpec& spec : parameter_table(config)) {
    const bool matrix = spec.dims.size() == 2 && spec.init != Init::normal;
    if (matrix) weights += static_cast<double>(spec.dims[0] * spec.dims[1]);
  }
  return weights;
}

double head_weights(const Config& config) {
  return static_cast<double>(config.vocab_padded * config.D);
}

double scan_flops(const Config& config, int64_t tokens) {
  const auto layers = [&](LayerKind kind) {
    return static_cast<double>(config.layers_of(kind).size());
  };
  return layers(LayerKind::mamba3) * mixer_scan_flops(config.mixer, tokens) +
         layers(LayerKind::mamba2) * mixer_scan_flops(config.mamba2, tokens) +
         layers(LayerKind::gated_deltanet) * delta_scan_flops(config.delta, tokens);
}

// Bytes that one decode step reads and writes. An untied embedding is read for one row only.
double step_bytes(const LanguageModel& model, const ModelSettings& s) {
  double bytes = 0;
  for (const TensorSpec& spec :
       state_table(model.config, s.batch, 0, state_types(model, s.state_dtype))) {
    double size = static_cast<double>(size_of(spec.dtype));
    for (const int64_t dim : spec.dims) size *= static_cast<double>(dim);
    bytes += 2 * size;
  }
  for (const std::string& name : model.tensors.names()) {
    const View& tensor = model.tensors.at(name);
    if (model.config.tied || tensor.data != model.weights.embedding.data) {
      bytes += static_cast<double>(tensor.bytes());
    }
  }
  return bytes;
}

Benchmark row(const ModelSettings& s, const std::string& mode, const std::string& shape,
              const Work& work, int64_t tokens, std::function<Prepared(Buffers& buffers)> prepare) {
  return {.op = "model_" + mode,
          .name = s.name,
          .shape = shape,
          .work = work,
          .dtype = product_type(s),
          .tokens = tokens,
          .prepare = std::move(prepare),
          .copies = 1};
}

using Model = std::shared_ptr<const LanguageModel>;

std::shared_ptr<Engine> engine_of(const ModelSettings& s, const Model& model) {
  return std::make_shared<Engine>(*model, s.batch, s.threads, state_types(*model, s.state_dtype));
}

Benchmark prefill(const ModelSettings& s, const Model& model) {
  const Config& config = model->config;
  const int64_t tokens = s.batch * s.tokens;
  const double flops = 2 * (layer_weights(config) * static_cast<double>(tokens) +
                            head_weights(config) * static_cast<double>(s.batch)) +
                       scan_flops(config, tokens);
  const std::string shape = fmt::format("B={} T={} {}", s.batch, s.tokens, name_of(s.dtype));
  return row(s, "prefill", shape, {.bytes = step_bytes(*model, s), .flops = flops}, tokens,
             [s, model](Buffers&) -> Prepared {
               const auto engine = engine_of(s, model);
               const std::vector<int32_t> ids = random_ids(model->config, s.batch * s.tokens);
               std::vector<float> logits(static_cast<size_t>(s.batch * model->config.vocab_padded));
               const auto call = [s, model, engine, ids, logits](Context&) mutable {
                 std::vector<std::span<const int32_t>> prompts;
                 for (int64_t b = 0; b < s.batch; ++b) {
                   prompts.emplace_back(ids.data() + b * s.tokens, static_cast<size_t>(s.tokens));
                 }
                 engine->reset();
                 engine->read(prompts);
                 engine->last_logits(view_of(logits.data(), {s.batch, model->config.vocab_padded}));
               };
               return {call, &engine->context()};
             });
}

Benchmark decode(const ModelSettings& s, const Model& model) {
  const Config& config = model->config;
  const double flops =
      static_cast<double>(s.batch) * (2 * (layer_weights(config) + head_weights(config)));
  const std::string shape = fmt::format("B={} {}", s.batch, name_of(s.dtype));
  return row(s, "decode", shape, {.bytes = step_bytes(*model, s), .flops = flops}, s.batch,
             [s, model](Buffers&) -> Prepared {
               const int64_t vocab = model->config.vocab;
               const auto engine = engine_of(s, model);
               const std::vector<int32_t> prompt =
                   random_ids(model->config, s.batch * kDecodePrompt);
               engine->append(view_of(prompt.data(), {s.batch, kDecodePrompt}));
               const auto call = [model, engine, vocab](Context&) {
                 engine->decode({.vocab = vocab, .temperature = 0}, [](auto) {});
               };
               return {call, &engine->context()};
             });
}

// A random batch, all tokens scored.
Batch training_batch(const Config& config, int64_t B, int64_t T) {
  Batch batch;
  batch.resize(B, T);
  batch.tokens = random_ids(config, B * T);
  batch.targets = random_ids(config, B * T);
  return batch;
}

Benchmark train(const ModelSettings& s, const Config& config) {
  const int64_t tokens = s.batch * s.tokens;
  const double weights = layer_weights(config) + head_weights(config);
  const DType dtype = product_type(s);
  // AdamW reads and writes all parameters, and their gradients and moments.
  const Work work{
      .bytes = 7 * 4 * static_cast<double>(parameter_count(config)),
      .flops = 6 * weights * static_cast<double>(tokens) + 3 * scan_flops(config, tokens)};
  const std::string shape = fmt::format("B={} T={} {}", s.batch, s.tokens, name_of(dtype));
  return row(s, "train", shape, work, tokens, [s, config, dtype](Buffers&) -> Prepared {
    const auto ctx = std::make_shared<Context>(s.threads, s.device);
    const std::vector<TensorSpec> table = parameter_table(config);
    const Trainer::State state{.parameters = random_parameters(config, DType::f32, s.threads),
                               .m = allocate(table),
                               .v = allocate(table)};
    const auto trainer = std::make_shared<Trainer>(*ctx, config, state, s.batch * s.tokens, dtype);
    const auto batch = std::make_shared<Batch>(training_batch(config, s.batch, s.tokens));
    const auto call = [ctx, trainer, batch](Context&) {
      trainer->update({batch.get(), 1}, OptimizerSettings{}, 1e-4);
    };
    return {call, ctx.get()};
  });
}

}  // namespace

std::vector<Benchmark> model_benchmarks(const ModelSettings& settings) {
  const Config& config = settings.config;
  Model model;  // made when first needed, shared by prefill and decode
  const auto shared_model = [&] {
    if (!model) {
      model = std::make_shared<LanguageModel>(random_model(settings));
    }
    return model;
  };
  for (const std::string& mode : settings.modes) {
    if (mode == "prefill" || mode == "decode" || mode == "train") continue;
    input_error("[bench model] unknown mode '{}'; the modes are prefill, decode, train", mode);
  }
  std::vector<Benchmark> benchmarks;
  for (const std::string& mode : settings.modes) {
    if (mode == "prefill") benchmarks.push_back(prefill(settings, shared_model()));
    if (mode == "decode") benchmarks.push_back(decode(settings, shared_model()));
    if (mode == "train") benchmarks.push_back(train(settings, config));
  }
  return benchmarks;
}

}  // namespace mamba3::bench
