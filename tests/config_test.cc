#include "model/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "model/tensors.h"
#include "support/errors.h"

namespace mamba3 {
namespace {

using testing::input_error_of;
using Json = nlohmann::json;

Json official() {
  return Json::parse(R"({
    "d_model": 64, "d_intermediate": 100, "n_layer": 3, "vocab_size": 253,
    "ssm_cfg": {"layer": "Mamba3", "d_state": 32, "expand": 2, "headdim": 32, "ngroups": 1,
      "rope_fraction": 0.5, "chunk_size": 64, "is_mimo": false, "mimo_rank": 4, "A_floor": 0.0001,
      "dt_min": 0.001, "dt_max": 0.1, "dt_init_floor": 0.0001, "is_outproj_norm": false},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": true, "residual_in_fp32": true,
    "fused_add_norm": true, "pad_vocab_size_multiple": 16, "tie_embeddings": true})");
}

Json hybrid() {
  Json json = official();
  json["attn_layer_idx"] = {2, 1};
  json["attn_cfg"] = {{"causal", true},     {"num_heads", 4},         {"num_heads_kv", 2},
                      {"head_dim", 16},     {"qkv_proj_bias", false}, {"out_proj_bias", true},
                      {"rotary_emb_dim", 0}};
  return json;
}

Json fla() {
  return Json::parse(R"({
    "architectures": ["Mamba3ForCausalLM"], "model_type": "mamba3", "hidden_size": 64,
    "state_size": 32, "num_hidden_layers": 2, "expand": 2, "head_dim": 32, "num_heads": 4,
    "n_groups": 2, "rope_fraction": 1.0, "A_floor": 0.001, "is_mimo": false, "mimo_rank": 4,
    "is_outproj_norm": true, "norm_eps": 1e-06, "vocab_size": 250, "use_bias": false,
    "tie_word_embeddings": false})");
}

Config parse(const Json& json, std::string_view decay_act = "auto") {
  return parse_config(json.dump(), "config.json", decay_act);
}

// The error that a file with one value replaced gives: {"ssm_cfg/d_state", 0}.
std::string error_with(Json json, const std::string& path, const Json& value) {
  json[Json::json_pointer("/" + path)] = value;
  return input_error_of([&] { parse(json); });
}

std::string error_without(Json json, const std::string& key) {
  json.erase(key);
  return input_error_of([&] { parse(json); });
}

// Everything but the layout and the reason of the dialect, which belong to one file.
void expect_same_model(const Config& a, const Config& b) {
  EXPECT_EQ(a.D, b.D);
  EXPECT_EQ(a.n_layer, b.n_layer);
  EXPECT_EQ(a.d_mlp, b.d_mlp);
  EXPECT_EQ(a.vocab, b.vocab);
  EXPECT_EQ(a.vocab_padded, b.vocab_padded);
  EXPECT_EQ(a.tied, b.tied);
  EXPECT_EQ(a.eps, b.eps);
  EXPECT_EQ(a.mixer.H, b.mixer.H);
  EXPECT_EQ(a.mixer.P, b.mixer.P);
  EXPECT_EQ(a.mixer.N, b.mixer.N);
  EXPECT_EQ(a.mixer.G, b.mixer.G);
  EXPECT_EQ(a.mixer.R, b.mixer.R);
  EXPECT_EQ(a.mixer.S, b.mixer.S);
  EXPECT_EQ(a.mixer.mimo, b.mixer.mimo);
  EXPECT_EQ(a.mixer.out_norm, b.mixer.out_norm);
  EXPECT_EQ(a.mixer.rope_pairs, b.mixer.rope_pairs);
  EXPECT_EQ(a.mixer.decay_act, b.mixer.decay_act);
  EXPECT_EQ(a.mixer.A_floor, b.mixer.A_floor);
  EXPECT_EQ(a.mixer.eps, b.mixer.eps);
  ASSERT_EQ(a.n_layer, b.n_layer);
  for (int64_t layer = 0; layer < a.n_layer; ++layer) EXPECT_EQ(a.kind(layer), b.kind(layer));
  EXPECT_EQ(a.mixer.rope, b.mixer.rope);
  EXPECT_EQ(a.mixer.discretisation, b.mixer.discretisation);
  EXPECT_EQ(a.mixer.bc_bias, b.mixer.bc_bias);
  EXPECT_EQ(a.mixer_conv.width, b.mixer_conv.width);
  EXPECT_EQ(a.mamba2.H, b.mamba2.H);
  EXPECT_EQ(a.mamba2_conv.width, b.mamba2_conv.width);
  EXPECT_EQ(a.mamba2_conv.bias, b.mamba2_conv.bias);
  EXPECT_EQ(a.delta.negative, b.delta.negative);
  EXPECT_EQ(a.delta.K, b.delta.K);
  EXPECT_EQ(a.delta_conv.width, b.delta_conv.width);
  EXPECT_EQ(a.attention.rotary_dims, b.attention.rotary_dims);
  EXPECT_EQ(a.attention.Hq, b.attention.Hq);
  EXPECT_EQ(a.attention.Hkv, b.attention.Hkv);
  EXPECT_EQ(a.attention.d, b.attention.d);
  EXPECT_EQ(a.attention.qkv_bias, b.attention.qkv_bias);
  EXPECT_EQ(a.attention.out_bias, b.attention.out_bias);
  EXPECT_EQ(a.dt_min, b.dt_min);
  EXPECT_EQ(a.dt_max, b.dt_max);
  EXPECT_EQ(a.dt_init_floor, b.dt_init_floor);
}

void expect_survives_writing(const Config& config) {
  expect_same_model(parse_config(to_json(config), "written"), config);
}

TEST(Config, ReadsTheOfficialLayout) {
  const Config c = parse(official());
  EXPECT_EQ(c.layout, Layout::official);
  EXPECT_EQ(c.D, 64);
  EXPECT_EQ(c.n_layer, 3);
  EXPECT_EQ(c.d_mlp, 128);  // 100 rounded up to a multiple of 128
  EXPECT_EQ(c.vocab, 253);
  EXPECT_EQ(c.vocab_padded, 256);
  EXPECT_TRUE(c.tied);
  EXPECT_EQ(c.mixer.H, 4);
  EXPECT_EQ(c.mixer.P, 32);
  EXPECT_EQ(c.mixer.N, 32);
  EXPECT_EQ(c.mixer.R, 1);  // mimo_rank means nothing without is_mimo
  EXPECT_EQ(c.mixer.S, 8);
  EXPECT_EQ(c.mixer.rope_pairs, RopePairs::neighbours);
  EXPECT_EQ(c.mixer.decay_act, DecayAct::heavy_tail);
  EXPECT_EQ(c.kind(1), LayerKind::mamba3);
}

TEST(Config, ReadsMimo) {
  Json json = official();
  json["ssm_cfg"]["is_mimo"] = true;
  json["ssm_cfg"]["mimo_rank"] = 3;
  json["ssm_cfg"]["rope_fraction"] = 1;
  const Config c = parse(json);
  EXPECT_TRUE(c.mixer.mimo);
  EXPECT_EQ(c.mixer.R, 3);
  EXPECT_EQ(c.mixer.S, 16);
  EXPECT_EQ(c.mixer.rope_pairs, RopePairs::halves);
}

TEST(Config, ReadsHybrids) {
  const Config c = parse(hybrid());
  EXPECT_EQ(c.layers_of(LayerKind::attention), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(c.kind(1), LayerKind::attention);
  EXPECT_EQ(c.kind(0), LayerKind::mamba3);
  EXPECT_EQ(c.attention.Hq, 4);
  EXPECT_EQ(c.attention.Hkv, 2);
  EXPECT_EQ(c.attention.d, 16);
  EXPECT_FALSE(c.attention.qkv_bias);
  EXPECT_TRUE(c.attention.out_bias);
}

TEST(Config, ReadsMamba2AsStateSpacesWritesIt) {
  // The whole of state-spaces/mamba2-130m's config.json.
  const Config c = parse(Json::parse(R"({"d_model": 768, "d_intermediate": 0, "n_layer": 24,
      "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
      "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true,
      "pad_vocab_size_multiple": 16, "tie_embeddings": true})"));
  EXPECT_EQ(c.kind(23), LayerKind::mamba2);
  EXPECT_EQ(c.mamba2.H, 24);
  EXPECT_EQ(c.mamba2.N, 128);
  EXPECT_EQ(c.mamba2_conv.width, 4);
  EXPECT_TRUE(c.mamba2_conv.bias);
  EXPECT_EQ(c.mamba2.d_proj(), 2 * 1536 + 2 * 128 + 24);
  EXPECT_EQ(parameter_count(c), 128989632);
}

TEST(Config, ReadsOtherKindsOfLayersAndAblations) {
  Json json = official();
  json["n_layer"] = 3;
  json["ssm_cfg"]["layers"] = {"Mamba2", "GatedDeltaNet", "Mamba3"};
  json["ssm_cfg"]["allow_neg_eigval"] = true;
  json["ssm_cfg"]["rope"] = "standard";
  json["ssm_cfg"]["discretisation"] = "euler";
  json["ssm_cfg"]["bc_bias"] = false;
  json["ssm_cfg"]["external_conv"] = 3;
  const Config c = parse(json);
  EXPECT_EQ(c.kind(0), LayerKind::mamba2);
  EXPECT_EQ(c.kind(1), LayerKind::gated_deltanet);
  EXPECT_EQ(c.kind(2), LayerKind::mamba3);
  EXPECT_EQ(c.mamba2.decay_act, DecayAct::constant);
  EXPECT_EQ(c.delta.H, c.mixer.H);
  EXPECT_EQ(c.delta.K, c.mixer.N);
  EXPECT_EQ(c.delta.V, c.mixer.P);
  EXPECT_TRUE(c.delta.negative);
  EXPECT_EQ(c.delta_conv.width, 4);
  EXPECT_FALSE(c.delta_conv.bias);
  EXPECT_EQ(c.mixer.rope, Rope::standard);
  EXPECT_EQ(c.mixer.discretisation, Discretisation::euler);
  EXPECT_FALSE(c.mixer.bc_bias);
  EXPECT_EQ(c.mixer_conv.width, 3);
  expect_survives_writing(c);
  json["ssm_cfg"]["rope"] = "none";
  EXPECT_EQ(parse(json).mixer.S, 0);
  expect_survives_writing(parse(json));
}

TEST(Config, ReadsRotaryAttention) {
  Json json = hybrid();
  json["attn_cfg"]["rotary_emb_dim"] = 8;
  const Config c = parse(json);
  EXPECT_EQ(c.attention.rotary_dims, 8);
  EXPECT_EQ(c.attention.rotary_base, 10000);
  expect_survives_writing(c);
}

TEST(Config, ReadsTheFlaLayout) {
  const Config c = parse(fla());
  EXPECT_EQ(c.layout, Layout::fla);
  EXPECT_EQ(c.D, 64);
  EXPECT_EQ(c.n_layer, 2);
  EXPECT_EQ(c.d_mlp, 0);
  EXPECT_EQ(c.vocab_padded, 250);
  EXPECT_FALSE(c.tied);
  EXPECT_EQ(c.eps, 1e-6f);
  EXPECT_EQ(c.mixer.eps, 1e-6f);
  EXPECT_EQ(c.mixer.H, 4);
  EXPECT_EQ(c.mixer.G, 2);
  EXPECT_EQ(c.mixer.S, 16);
  EXPECT_EQ(c.mixer.A_floor, 1e-3f);
  EXPECT_TRUE(c.mixer.out_norm);
  EXPECT_EQ(c.mixer.decay_act, DecayAct::softplus);
}

TEST(Config, AbsentKeysHaveTheReferenceDefaults) {
  const Config c = parse_config(
      R"({"d_model": 768, "n_layer": 2, "vocab_size": 100, "ssm_cfg": {"layer": "Mamba3"},
          "attn_layer_idx": [0], "attn_cfg": {"num_heads": 12, "causal": true, "head_dim": null}})",
      "config.json");
  EXPECT_EQ(c.d_mlp, 0);
  EXPECT_EQ(c.vocab_padded, 104);  // a multiple of 8
  EXPECT_TRUE(c.tied);
  EXPECT_EQ(c.mixer.N, 128);
  EXPECT_EQ(c.mixer.P, 64);
  EXPECT_EQ(c.mixer.H, 24);
  EXPECT_EQ(c.mixer.G, 1);
  EXPECT_EQ(c.mixer.S, 32);
  EXPECT_EQ(c.mixer.A_floor, 1e-4f);
  EXPECT_EQ(c.dt_min, 1e-3);
  EXPECT_EQ(c.dt_max, 0.1);
  EXPECT_EQ(c.dt_init_floor, 1e-4);
  EXPECT_EQ(c.attention.Hkv, 12);
  EXPECT_EQ(c.attention.d, 64);
  EXPECT_TRUE(c.attention.qkv_bias);
  EXPECT_TRUE(c.attention.out_bias);
}

TEST(Config, ExpandMayBeAFraction) {
  Json json = official();
  json["ssm_cfg"]["expand"] = 1.5;
  EXPECT_EQ(parse(json).mixer.H, 3);
  // expand = 49/60 and the like are no doubles: floor(expand * D) must still be d_inner.
  for (int64_t D = 40; D < 100; ++D) {
    Config c = parse(official());
    c.D = D;
    c.mixer.P = 7;
    c.mixer.H = 7;
    EXPECT_EQ(parse_config(to_json(c), "written").mixer.H, 7) << "D = " << D;
  }
}

TEST(Config, DialectFollowsTheLayoutUnlessAsked) {
  EXPECT_EQ(parse(official(), "softplus").mixer.decay_act, DecayAct::softplus);
  EXPECT_EQ(parse(fla(), "heavy_tail").mixer.decay_act, DecayAct::heavy_tail);
  EXPECT_EQ(parse(official()).decay_reason, "the default of the official layout");
  EXPECT_EQ(parse(fla()).decay_reason, "the default of the flash-linear-attention layout");
  EXPECT_EQ(parse(fla(), "softplus").decay_reason, "asked for");
  EXPECT_EQ(input_error_of([] { parse(official(), "relu"); }),
            "unknown decay_act \"relu\": use auto, heavy_tail or softplus");
}

TEST(Config, WritingKeepsTheModel) {
  expect_survives_writing(parse(official()));
  expect_survives_writing(parse(hybrid()));
  expect_survives_writing(parse(fla()));  // with its dialect and eps, in the official layout
  expect_survives_writing(parse(official(), "softplus"));
  expect_survives_writing(published_config("187m-mimo"));
  Config padded = parse(official());
  padded.vocab_padded = 259;  // what no power of two gives
  expect_survives_writing(padded);
}

TEST(Config, WritesOnlyKeysOfTheReferencePackage) {
  const std::vector<std::string> known = {"d_model",
                                          "d_intermediate",
                                          "n_layer",
                                          "vocab_size",
                                          "ssm_cfg",
                                          "attn_layer_idx",
                                          "attn_cfg",
                                          "rms_norm",
                                          "residual_in_fp32",
                                          "fused_add_norm",
                                          "pad_vocab_size_multiple",
                                          "tie_embeddings"};
  const Json json = Json::parse(to_json(parse(fla())));
  for (const auto& [key, value] : json.items()) {
    EXPECT_NE(std::find(known.begin(), known.end(), key), known.end()) << key;
  }
  EXPECT_EQ(json["ssm_cfg"]["A_floor"], 1e-3);  // and not the float's 0.0010000000474974513
  EXPECT_EQ(json["ssm_cfg"]["decay_act"], "softplus");
  EXPECT_FALSE(Json::parse(to_json(parse(official())))["ssm_cfg"].contains("decay_act"));
}

TEST(Config, ChunkSizeOfMimoIsAPowerOfTwo) {
  Config c = published_config("187m-mimo");
  const auto chunk_size = [&] { return Json::parse(to_json(c))["ssm_cfg"]["chunk_size"]; };
  EXPECT_EQ(chunk_size(), 16);
  c.mixer.R = 3;
  EXPECT_EQ(chunk_size(), 16);
  c.mixer.R = 100;
  EXPECT_EQ(chunk_size(), 1);
}

TEST(Config, PublishedSizesHaveThePaperParameterCounts) {
  EXPECT_EQ(parameter_count(published_config("187m-siso")), 186849600);
  const auto millions = [](std::string_view size) {
    return static_cast<double>(parameter_count(published_config(size))) * 1e-6;
  };
  EXPECT_NEAR(millions("187m-mimo"), 187.29, 0.005);
  EXPECT_NEAR(millions("443m-siso"), 443.0, 0.05);
  EXPECT_NEAR(millions("443m-mimo"), 444.2, 0.05);
  EXPECT_NEAR(millions("893m-siso"), 892.8, 0.05);
  EXPECT_NEAR(millions("893m-mimo"), 894.6, 0.05);
  EXPECT_NEAR(millions("1.5b-siso"), 1495, 0.5);
  EXPECT_NEAR(millions("1.5b-mimo"), 1497, 0.5);
  expect_same_model(published_config("880m-mimo"), published_config("893m-mimo"));
}

TEST(Config, PublishedSizesAreListed) {
  for (const char* size : {"188m-siso", "187m", "187m-", "187m-both", ""}) {
    EXPECT_EQ(input_error_of([&] { published_config(size); }),
              fmt::format("unknown model size \"{}\": use 187m, 443m, 893m or 1.5b, followed by "
                          "-siso or -mimo",
                          size));
  }
}

TEST(ConfigErrors, InvalidJsonNamesThePosition) {
  const std::string error =
      input_error_of([] { parse_config("{\"d_model\": 64,\n\"n_layer\" 2}", "config.json"); });
  EXPECT_NE(error.find("config.json: not valid JSON: parse error at line 2, column"),
            std::string::npos)
      << error;
  EXPECT_NE(input_error_of([] { parse_config("", "config.json"); }).find("not valid JSON"),
            std::string::npos);
  EXPECT_NE(
      input_error_of([] { parse_config("{\"d_model\": 1e999}", "c"); }).find("not valid JSON"),
      std::string::npos);
  EXPECT_EQ(input_error_of([] { parse_config("[1]", "config.json"); }),
            "config.json: must be a JSON object");
}

TEST(ConfigErrors, MissingKeys) {
  EXPECT_EQ(error_without(official(), "n_layer"), "config.json: n_layer is missing");
  EXPECT_EQ(error_without(official(), "vocab_size"), "config.json: vocab_size is missing");
  EXPECT_EQ(error_without(official(), "d_model"),
            "config.json: d_model is missing (and so is hidden_size, its name in the "
            "flash-linear-attention layout)");
  EXPECT_EQ(error_without(official(), "ssm_cfg"),
            "config.json: ssm_cfg.layer is \"Mamba1\" when absent: only Mamba3, Mamba2 or "
            "GatedDeltaNet are supported");
  EXPECT_EQ(error_without(fla(), "num_hidden_layers"), "config.json: num_hidden_layers is missing");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg", Json::object()),
            "config.json: attn_cfg.num_heads is missing");
}

TEST(ConfigErrors, AbsurdValues) {
  EXPECT_EQ(error_with(official(), "ssm_cfg/d_state", 0),
            "config.json: ssm_cfg.d_state must be an integer from 1 to 1048576, got 0");
  EXPECT_EQ(error_with(official(), "d_model", -64),
            "config.json: d_model must be an integer from 1 to 1048576, got -64");
  EXPECT_EQ(error_with(official(), "n_layer", 1000000),
            "config.json: n_layer must be an integer from 1 to 16384, got 1000000");
  EXPECT_EQ(error_with(official(), "vocab_size", 18446744073709551615u),
            "config.json: vocab_size must be an integer from 1 to 16777216, got "
            "18446744073709551615");
  EXPECT_EQ(error_with(official(), "d_intermediate", -1),
            "config.json: d_intermediate must be an integer from 0 to 1048576, got -1");
  EXPECT_EQ(error_with(official(), "pad_vocab_size_multiple", 0),
            "config.json: pad_vocab_size_multiple must be an integer from 1 to 65536, got 0");
  EXPECT_EQ(error_with(official(), "ssm_cfg/headdim", 48),
            "config.json: ssm_cfg.headdim must divide expand * d_model = 128, got 48");
  EXPECT_EQ(error_with(official(), "ssm_cfg/headdim", 256),
            "config.json: ssm_cfg.headdim must divide expand * d_model = 128, got 256");
  EXPECT_EQ(error_with(official(), "ssm_cfg/ngroups", 3),
            "config.json: ssm_cfg.ngroups must divide the number of heads 4, got 3");
  EXPECT_EQ(error_with(official(), "ssm_cfg/expand", 0.001),
            "config.json: ssm_cfg.expand * d_model must be from 1 to 1048576, got 0");
  EXPECT_EQ(error_with(official(), "ssm_cfg/expand", -2),
            "config.json: ssm_cfg.expand must be a number from 1e-30 to 1e30, got -2");
  EXPECT_EQ(error_with(official(), "ssm_cfg/rope_fraction", 0.25),
            "config.json: ssm_cfg.rope_fraction must be 0.5 or 1, got 0.25");
  EXPECT_EQ(error_with(official(), "ssm_cfg/d_state", 2),
            "config.json: ssm_cfg.d_state is 2, too small for rope_fraction 0.5");
  EXPECT_EQ(error_with(official(), "ssm_cfg/dt_max", 1e-9),
            "config.json: ssm_cfg.dt_max must not be below dt_min = 0.001, got 1e-09");
  EXPECT_EQ(error_with(official(), "ssm_cfg/A_floor", 0),
            "config.json: ssm_cfg.A_floor must be a number from 1e-30 to 1e30, got 0");
  EXPECT_EQ(error_with(fla(), "norm_eps", 1e300),
            "config.json: norm_eps must be a number from 1e-30 to 1e30, got 1e+300");
  EXPECT_EQ(error_with(fla(), "num_heads", 5),
            "config.json: num_heads must be expand * hidden_size / head_dim = 4, got 5");
}

TEST(ConfigErrors, AbsurdMimo) {
  Json json = official();
  json["ssm_cfg"]["is_mimo"] = true;
  EXPECT_EQ(error_with(json, "ssm_cfg/mimo_rank", 0),
            "config.json: ssm_cfg.mimo_rank must be an integer from 1 to 1048576, got 0");
  EXPECT_EQ(error_with(json, "ssm_cfg/mimo_rank", 1048576),
            "config.json: ssm_cfg.d_state * ngroups * mimo_rank must be at most 1048576, got "
            "33554432");
  EXPECT_EQ(error_with(json, "ssm_cfg/d_state", 33),
            "config.json: ssm_cfg.d_state must be even when is_mimo is true, got 33");
}

TEST(ConfigErrors, AbsurdAttention) {
  EXPECT_EQ(error_with(hybrid(), "attn_layer_idx", {0, 3}),
            "config.json: attn_layer_idx names layer 3, but the layers are 0 to 2");
  EXPECT_EQ(error_with(hybrid(), "attn_layer_idx", {-1}),
            "config.json: attn_layer_idx names layer -1, but the layers are 0 to 2");
  EXPECT_EQ(error_with(hybrid(), "attn_layer_idx", {1, 1}),
            "config.json: attn_layer_idx names layer 1 twice");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/num_heads_kv", 3),
            "config.json: attn_cfg.num_heads_kv must divide num_heads = 4, got 3");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/num_heads", 1048576),
            "config.json: attn_cfg.num_heads * head_dim must be at most 1048576, got 16777216");
  Json json = hybrid();
  json["attn_cfg"].erase("head_dim");
  EXPECT_EQ(error_with(json, "attn_cfg/num_heads", 6),
            "config.json: attn_cfg.num_heads must divide d_model = 64 unless head_dim is given, "
            "got 6");
}

TEST(ConfigErrors, UnsupportedModels) {
  EXPECT_EQ(error_with(official(), "ssm_cfg/layer", "Mamba1"),
            "config.json: ssm_cfg.layer is \"Mamba1\": only Mamba3, Mamba2 or GatedDeltaNet are "
            "supported");
  EXPECT_EQ(error_with(fla(), "model_type", "llama"),
            "config.json: model_type is \"llama\": only \"mamba3\" is supported");
  EXPECT_EQ(error_with(fla(), "use_bias", true),
            "config.json: use_bias must be false: biases are unsupported");
  EXPECT_EQ(error_with(official(), "rms_norm", false),
            "config.json: rms_norm must be true: LayerNorm is unsupported");
  EXPECT_EQ(error_with(official(), "ssm_cfg/decay_act", "relu"),
            "config.json: ssm_cfg.decay_act must be heavy_tail or softplus, got \"relu\"");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/causal", false),
            "config.json: attn_cfg.causal must be true: only causal attention is supported");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/rotary_emb_dim", 64),
            "config.json: attn_cfg.rotary_emb_dim must be an integer from 0 to 16, got 64");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/rotary_emb_dim", 7),
            "config.json: attn_cfg.rotary_emb_dim must be even, got 7");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/rotary_emb_interleaved", true),
            "config.json: attn_cfg.rotary_emb_interleaved must be false: no other value is "
            "supported");
  EXPECT_EQ(error_with(official(), "ssm_cfg/rope", "alibi"),
            "config.json: ssm_cfg.rope must be data, standard or none, got \"alibi\"");
  EXPECT_EQ(error_with(official(), "ssm_cfg/discretisation", "zoh"),
            "config.json: ssm_cfg.discretisation must be trapezoidal, half or euler, got \"zoh\"");
  EXPECT_EQ(error_with(official(), "ssm_cfg/external_conv", 1),
            "config.json: ssm_cfg.external_conv must be 0 or from 2 to 8, got 1");
  EXPECT_EQ(error_with(official(), "ssm_cfg/layers", {"Mamba3"}),
            "config.json: ssm_cfg.layers must name 3 layers, got 1");
  EXPECT_EQ(error_with(official(), "ssm_cfg/layers", {"Mamba3", "Mamba4", "Mamba2"}),
            "config.json: ssm_cfg.layers is \"Mamba4\": only Mamba3, Mamba2 or GatedDeltaNet are "
            "supported");
  Json mamba2 = official();
  mamba2["ssm_cfg"]["layer"] = "Mamba2";
  EXPECT_EQ(error_with(mamba2, "ssm_cfg/norm_before_gate", true),
            "config.json: ssm_cfg.norm_before_gate must be false: no other value is supported");
  EXPECT_EQ(error_with(mamba2, "ssm_cfg/d_ssm", 64),
            "config.json: ssm_cfg.d_ssm must be absent: it is not supported");
  EXPECT_EQ(error_with(mamba2, "ssm_cfg/d_conv", 9),
            "config.json: ssm_cfg.d_conv must be an integer from 2 to 8, got 9");
  Json delta = official();
  delta["ssm_cfg"]["layer"] = "GatedDeltaNet";
  EXPECT_EQ(error_with(delta, "ssm_cfg/ngroups", 2),
            "config.json: ssm_cfg.ngroups must be 1 in a Gated DeltaNet layer, got 2");
  EXPECT_EQ(
      error_with(delta, "ssm_cfg/d_state", 2048),
      "config.json: ssm_cfg.d_state must be at most 1024 in a Gated DeltaNet layer, got 2048");
  EXPECT_EQ(error_with(hybrid(), "attn_cfg/softmax_scale", 0.1),
            "config.json: attn_cfg.softmax_scale must be absent: it is not supported");
}

TEST(ConfigErrors, WrongTypes) {
  EXPECT_EQ(error_with(official(), "d_model", "64"),
            "config.json: d_model must be an integer from 1 to 1048576, got \"64\"");
  EXPECT_EQ(error_with(official(), "d_model", 64.5),
            "config.json: d_model must be an integer from 1 to 1048576, got 64.5");
  EXPECT_EQ(error_with(official(), "tie_embeddings", 1),
            "config.json: tie_embeddings must be true or false, got 1");
  EXPECT_EQ(error_with(official(), "ssm_cfg", Json::array()),
            "config.json: ssm_cfg must be an object, got []");
  EXPECT_EQ(error_with(official(), "ssm_cfg/layer", 3),
            "config.json: ssm_cfg.layer must be a string, got 3");
  EXPECT_EQ(error_with(official(), "ssm_cfg/A_floor", "low"),
            "config.json: ssm_cfg.A_floor must be a number from 1e-30 to 1e30, got \"low\"");
  EXPECT_EQ(error_with(official(), "attn_layer_idx", {"one"}),
            "config.json: attn_layer_idx must be an array of integers, got [\"one\"]");
  EXPECT_EQ(
      error_with(official(), "tie_embeddings", std::string(100, 'x')),
      "config.json: tie_embeddings must be true or false, got \"" + std::string(39, 'x') + "...");
}

TEST(Config, ReadsEveryGolden) {
  const std::filesystem::path goldens = std::filesystem::path(MAMBA3_SHARED) / "goldens";
  if (!std::filesystem::is_directory(goldens)) GTEST_SKIP() << goldens << " is absent";
  for (const auto& folder : std::filesystem::directory_iterator(goldens)) {
    SCOPED_TRACE(folder.path());
    std::ifstream file(folder.path() / "config.json");
    std::stringstream text;
    text << file.rdbuf();
    const Config config = parse_config(text.str(), folder.path().string());
    expect_survives_writing(config);
    const Json expected = Json::parse(std::ifstream(folder.path() / "expected.json"));
    EXPECT_EQ(config.mixer.decay_act == DecayAct::softplus, expected["dialect"] == "softplus");
    EXPECT_EQ(config.mixer.rope_pairs == RopePairs::neighbours,
              expected["rope_pairs"] == "interleaved");
  }
}

}  // namespace
}  // namespace mamba3
