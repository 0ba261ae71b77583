#include "mamba3/model.h"

#include "core/error.h"
#include "infer/fingerprint.h"
#include "infer/model_impl.h"
#include "model/checkpoint.h"
#include "model/state.h"

namespace mamba3 {

namespace {

int64_t bytes_of(const NamedTensors& tensors) {
  int64_t bytes = 0;
  for (const std::string& name : tensors.names()) bytes += tensors.at(name).bytes();
  return bytes;
}

std::vector<std::string> layer_kinds(const Config& config) {
  std::vector<std::string> kinds;
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    kinds.emplace_back(name_of(config.kind(layer)));
  }
  return kinds;
}

std::string decay_name(const Config& config) {
  if (!config.has(LayerKind::mamba3)) return "";
  return config.mixer.decay_act == DecayAct::heavy_tail ? "heavy_tail" : "softplus";
}

ModelInfo describe(const Checkpoint& checkpoint) {
  const Config& config = checkpoint.config;
  const MixerShape& mixer = config.has(LayerKind::mamba2) ? config.mamba2 : config.mixer;
  const Config::Heads heads = config.heads();
  return {.layout = config.layout == Layout::official ? "official" : "fla",
          .layers = config.n_layer,
          .layer_kinds = layer_kinds(config),
          .attention_layers = config.layers_of(LayerKind::attention),
          .width = config.D,
          .mlp_width = config.d_mlp,
          .heads = heads.H,
          .head_dim = heads.P,
          .state_size = heads.N,
          .groups = mixer.G,
          .mimo_rank = config.mixer.R,
          .mimo = config.mixer.mimo,
          .out_norm = config.mixer.out_norm,
          .rotary_angles = config.mixer.S,
          .decay = decay_name(config),
          .decay_reason = config.decay_reason,
          .vocab = config.vocab,
          .vocab_padded = config.vocab_padded,
          .tied = config.tied,
          .parameters = parameter_count(config),
          .device = "cpu",  // until it is placed
          .weight_dtype =
              std::string(name_of(checkpoint.tensors.at("backbone.embedding.weight").dtype)),
          .weight_bytes = bytes_of(checkpoint.tensors),
          .state_bytes = state_bytes(config, 0),
          .state_bytes_per_token = state_bytes(config, 1) - state_bytes(config, 0),
          .warnings = checkpoint.warnings};
}

std::optional<Tokenizer> find_tokenizer(const std::filesystem::path& folder,
                                        const std::string& named, int64_t vocab) {
  if (named == "bytes") return Tokenizer::bytes();
  if (!named.empty()) return Tokenizer::from_file(named);
  if (auto found = Tokenizer::find_in(folder)) return found;
  if (vocab <= Tokenizer::bytes().vocab_size()) return Tokenizer::bytes();
  return std::nullopt;
}

}  // namespace

Model Model::load(const std::filesystem::path& folder, const LoadOptions& options) {
  const Placement placement = parse_placement(options.device, options.dtype);
  const Checkpoint checkpoint = load_checkpoint(folder, options.decay);
  LanguageModel model = make_language_model(checkpoint.config, checkpoint.tensors);
  std::string print = fingerprint(model);
  if (placement.device != Device::cpu) {
    Context ctx(1, placement.device);
    model = place_language_model(ctx, model, placement.dtype);
  }
  ModelInfo info = describe(checkpoint);
  info.device = name_of(placement.device);
  return Model(std::make_shared<const Impl>(
      Impl{std::move(model), std::move(print),
           find_tokenizer(folder, options.tokenizer, checkpoint.config.vocab), std::move(info)}));
}

const ModelInfo& Model::info() const {
  return impl_->info;
}

bool Model::has_tokenizer() const {
  return impl_->tokenizer.has_value();
}

const Tokenizer& Model::tokenizer() const {
  if (!impl_->tokenizer) {
    input_error(
        "this model has no tokenizer: its folder has no tokenizer.json, and {} ids are not raw "
        "bytes; put the tokenizer.json that it was trained with into the folder, or name it with "
        "--tokenizer (the published Mamba-3 models use Llama-3.1's), or give and take token ids",
        info().vocab);
  }
  return *impl_->tokenizer;
}

}  // namespace mamba3
