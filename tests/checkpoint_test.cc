#include "model/checkpoint.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <set>

#include "formats/safetensors.h"
#include "support/archives.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/random.h"
#include "support/temp_folder.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

namespace fs = std::filesystem;
using testing::error_of;
using testing::FileSizeLimit;
using testing::input_error_of;
using testing::raw;
using testing::read_file;
using testing::TempFolder;
using testing::TorchStorage;
using testing::values_of;
using testing::write_file;

const std::string kEmbedding = "backbone.embedding.weight";

Config siso() {
  Config c;
  c.D = 4;
  c.n_layer = 2;
  c.d_mlp = 128;
  c.vocab = 10;
  c.vocab_padded = 16;
  c.mixer = {.H = 2, .P = 4, .N = 4, .S = 1};
  return c;
}

Config mimo_hybrid() {
  Config c = siso();
  c.tied = false;
  c.d_mlp = 0;
  c.mixer.R = 3;
  c.mixer.mimo = c.mixer.out_norm = true;
  c.mixer.rope_pairs = RopePairs::halves;
  c.mixer.decay_act = DecayAct::softplus;
  c.layers = {LayerKind::mamba3, LayerKind::attention};
  c.attention = {.Hq = 2, .Hkv = 1, .d = 3, .qkv_bias = true, .out_bias = true};
  return c;
}

// Matrices in `dtype`, the rest f32, all values different from each other.
NamedTensors parameters_of(const Config& config, DType dtype = DType::f32) {
  std::vector<TensorSpec> table = parameter_table(config);
  for (TensorSpec& spec : table) {
    if (spec.dims.size() == 2) spec.dtype = dtype;
  }
  NamedTensors tensors = allocate(table);
  double value = 0;
  for (const std::string& name : tensors.names()) {
    const View& view = tensors.at(name);
    for (int64_t i = 0; i < view.size(); ++i) testing::set_value(view, i, value += 0.25);
  }
  return tensors;
}

std::vector<NamedView> views_of(const NamedTensors& tensors) {
  std::vector<NamedView> views;
  for (const std::string& name : tensors.names()) views.push_back({name, tensors.at(name)});
  return views;
}

NamedView& find(std::vector<NamedView>& views, const std::string& name) {
  return *std::find_if(views.begin(), views.end(), [&](auto& v) { return v.name == name; });
}

void expect_same_tensors(const NamedTensors& got, const NamedTensors& want) {
  ASSERT_EQ(got.names(), want.names());
  for (const std::string& name : want.names()) {
    SCOPED_TRACE(name);
    EXPECT_EQ(got.at(name).dtype, want.at(name).dtype);
    EXPECT_EQ(got.at(name).shape(), want.at(name).shape());
    EXPECT_EQ(values_of(got.at(name)), values_of(want.at(name)));
  }
}

// A folder with the SISO model's config and the tensors that `change` leaves of its parameters.
class Folder {
 public:
  using Change = std::function<void(std::vector<NamedView>&)>;

  explicit Folder(const Change& change = [](auto&) {}) : tensors_(parameters_of(siso())) {
    write_file(path() / "config.json", to_json(siso()));
    std::vector<NamedView> views = views_of(tensors_);
    change(views);
    write_safetensors(weights(), views);
  }

  const fs::path& path() const { return folder_.path(); }
  fs::path weights() const { return path() / "model.safetensors"; }
  const NamedTensors& tensors() const { return tensors_; }

  Checkpoint load() const { return load_checkpoint(path()); }
  // The error without the path of the file that it begins with.
  std::string error(const std::string& file = "model.safetensors") const {
    const std::string text = input_error_of([&] { load(); });
    const std::string start = (path() / file).string() + ": ";
    return text.starts_with(start) ? text.substr(start.size()) : text;
  }
  std::vector<std::string> warnings() const {
    std::vector<std::string> result = load().warnings;
    for (std::string& text : result) text = text.substr(weights().string().size() + 2);
    return result;
  }

 private:
  TempFolder folder_;
  NamedTensors tensors_;
};

TEST(Checkpoint, LoadsWhatItSaved) {
  for (const Config& config : {siso(), mimo_hybrid()}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const TempFolder folder;
      const NamedTensors tensors = parameters_of(config, dtype);
      save_checkpoint(folder / "new/folder", config, tensors);
      const Checkpoint got = load_checkpoint(folder / "new/folder");
      expect_same_tensors(got.tensors, tensors);
      EXPECT_EQ(got.warnings, std::vector<std::string>{});
      EXPECT_EQ(got.config.layers_of(LayerKind::attention), config.layers_of(LayerKind::attention));
      EXPECT_EQ(got.config.mixer.decay_act, config.mixer.decay_act);
      EXPECT_EQ(got.config.mixer.R, config.mixer.R);
      EXPECT_EQ(parameter_count(got.config), parameter_count(config));
    }
  }
}

TEST(Checkpoint, DecayActCanBeAskedFor) {
  const Folder folder;
  EXPECT_EQ(folder.load().config.mixer.decay_act, DecayAct::heavy_tail);
  EXPECT_EQ(load_checkpoint(folder.path(), "softplus").config.mixer.decay_act, DecayAct::softplus);
}

// The reference package's load_state_dict wants every name, lm_head.weight too when it is tied, and
// transformers wants the metadata.
TEST(Checkpoint, SavesWhatTheReferencePackageLoads) {
  const TempFolder folder;
  save_checkpoint(folder.path(), siso(), parameters_of(siso()));
  const TensorFile file = read_safetensors(folder / "model.safetensors");
  EXPECT_EQ(file.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_EQ(file.tensors.size(), parameter_table(siso()).size() + 1);
  EXPECT_EQ(values_of(file.at("lm_head.weight")), values_of(file.at(kEmbedding)));
}

TEST(Checkpoint, OldCheckpointSurvivesAFullDisk) {
  const TempFolder folder;
  const NamedTensors before = parameters_of(siso());
  save_checkpoint(folder.path(), siso(), before);
  Config other = siso();
  other.n_layer = 3;
  {
    const FileSizeLimit limit(4096);
    const std::string error =
        error_of([&] { save_checkpoint(folder.path(), other, parameters_of(other)); });
    EXPECT_EQ(error, "cannot write " + (folder / "model.safetensors").string() +
                         ": File too large; what was there before is unchanged");
  }
  expect_same_tensors(load_checkpoint(folder.path()).tensors, before);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 2);  // nothing left over
}

TEST(Checkpoint, SaysWhyItCannotSave) {
  const TempFolder folder;
  write_file(folder / "file", "");
  EXPECT_EQ(error_of([&] { save_checkpoint(folder / "file", siso(), parameters_of(siso())); }),
            "cannot create " + (folder / "file").string() + ": Not a directory");
  Config other = siso();
  other.D = 8;
  EXPECT_EQ(error_of([&] { save_checkpoint(folder / "x", other, parameters_of(siso())); }),
            "[save_checkpoint] shape of backbone.embedding.weight: got (16, 4), want (16, 8)");
}

TEST(Checkpoint, SavesIntoTheFolderItIsMappedFrom) {
  const Folder folder;
  const Checkpoint loaded = folder.load();
  save_checkpoint(folder.path(), loaded.config, loaded.tensors);
  expect_same_tensors(folder.load().tensors, folder.tensors());
}

// Files of torch.

// One storage a tensor, as torch writes them; a tied head shares the embedding's.
std::string torch_file(const std::vector<NamedView>& views, bool head) {
  std::vector<TorchTensor> tensors;
  std::vector<TorchStorage> storages;
  for (const auto& [name, view] : views) {
    std::vector<int64_t> dims(view.dims.begin(), view.dims.begin() + view.rank);
    std::vector<int64_t> strides(view.strides.begin(), view.strides.begin() + view.rank);
    const std::string key = std::to_string(storages.size());
    tensors.push_back({.name = name,
                       .storage = key,
                       .dtype = view.dtype,
                       .storage_size = view.size(),
                       .dims = dims,
                       .strides = strides});
    storages.push_back(
        {key, std::string(static_cast<const char*>(view.data), static_cast<size_t>(view.bytes()))});
  }
  if (head) {
    tensors.push_back(tensors[0]);
    tensors.back().name = "lm_head.weight";
  }
  return testing::torch_file_of(tensors, storages);
}

TEST(Checkpoint, LoadsPytorchModelBin) {
  const Folder folder;
  fs::remove(folder.weights());
  write_file(folder.path() / "pytorch_model.bin", torch_file(views_of(folder.tensors()), true));
  const Checkpoint got = folder.load();
  expect_same_tensors(got.tensors, folder.tensors());
  EXPECT_EQ(got.warnings, std::vector<std::string>{});
}

TEST(Checkpoint, SafetensorsComeFirst) {
  const Folder folder;
  write_file(folder.path() / "pytorch_model.bin", "");
  expect_same_tensors(folder.load().tensors, folder.tensors());
}

// Shards.

// Splits the model's tensors into two files and writes the index that `change` leaves.
void write_shards(const Folder& folder, const std::function<void(std::string&)>& change = {},
                  bool torch = false) {
  const std::string base = torch ? "pytorch_model" : "model", end = torch ? ".bin" : ".safetensors";
  const std::vector<NamedView> views = views_of(folder.tensors());
  std::string index;
  for (const size_t part : {0u, 1u}) {
    std::vector<NamedView> mine;
    const std::string name = fmt::format("{}-{}-of-2{}", base, part, end);
    for (size_t i = part; i < views.size(); i += 2) {
      mine.push_back(views[i]);
      index += fmt::format("{}\"{}\": \"{}\"", index.empty() ? "" : ", ", views[i].name, name);
    }
    if (torch) {
      write_file(folder.path() / name, torch_file(mine, false));
    } else {
      write_safetensors(folder.path() / name, mine);
    }
  }
  index = "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {" + index + "}}";
  if (change) change(index);
  fs::remove(folder.weights());
  write_file(folder.path() / (base + end + ".index.json"), index);
}

std::string replaced(std::string text, std::string_view from, std::string_view to) {
  return text.replace(text.find(from), from.size(), to);
}

TEST(Checkpoint, LoadsShards) {
  for (const bool torch : {false, true}) {
    const Folder folder;
    write_shards(folder, {}, torch);
    const Checkpoint got = folder.load();
    expect_same_tensors(got.tensors, folder.tensors());
    EXPECT_EQ(got.warnings, std::vector<std::string>{});
  }
}

TEST(CheckpointErrors, Shards) {
  const std::string index = "model.safetensors.index.json";
  const auto error_with = [&](const std::function<void(std::string&)>& change) {
    const Folder folder;
    write_shards(folder, change);
    return folder.error(index);
  };
  EXPECT_EQ(error_with([](std::string& text) {
              text = replaced(text, "model-0-of-2", "../model-0-of-2");
            }),
            "the file of \"backbone.embedding.weight\" must be a name without folders, got "
            "\"../model-0-of-2.safetensors\"");
  EXPECT_EQ(
      error_with([](std::string& text) { text = replaced(text, "model-0-of-2", "model-1-of-2"); }),
      "\"backbone.embedding.weight\" is not in model-1-of-2.safetensors");
  EXPECT_EQ(error_with([](std::string& text) {
              text = replaced(text, "backbone.embedding", "backbone.imbedding");
            }),
            "\"backbone.imbedding.weight\" is not in model-0-of-2.safetensors");
  EXPECT_EQ(error_with([](std::string& text) { text = "{\"weight_map\": []}"; }),
            "there is no object weight_map");
  EXPECT_EQ(error_with([](std::string& text) { text = std::string(1000, '['); }),
            "nested too deeply");
  EXPECT_TRUE(error_with([](std::string& text) { text = "{"; }).starts_with("not valid JSON: "));

  const Folder folder;
  write_shards(folder);
  fs::remove(folder.path() / "model-1-of-2.safetensors");
  EXPECT_EQ(folder.error(), "cannot read " + (folder.path() / "model-1-of-2.safetensors").string() +
                                ": No such file or directory");
  fs::copy(folder.path() / "model-0-of-2.safetensors", folder.path() / "model-1-of-2.safetensors");
  EXPECT_EQ(folder.error(index), "there are two tensors \"backbone.embedding.weight\"");
}

// Folders and tensors that are not as they should be.

TEST(CheckpointErrors, FoldersThatAreNone) {
  const TempFolder folder;
  const std::string path = folder.path().string();
  EXPECT_EQ(input_error_of([&] { load_checkpoint(path + "/absent"); }),
            path + "/absent: there is no such folder");
  EXPECT_EQ(input_error_of([&] { load_checkpoint(folder.path()); }),
            path +
                ": has no config.json: a checkpoint folder holds it and model.safetensors or "
                "pytorch_model.bin");
  write_file(folder / "config.json", to_json(siso()));
  EXPECT_EQ(input_error_of([&] { load_checkpoint(folder.path()); }),
            path +
                ": has no weights: model.safetensors or pytorch_model.bin, or one of their "
                "index files (model.safetensors.index.json)");
  EXPECT_EQ(input_error_of([&] { load_checkpoint(folder / "config.json"); }),
            path + "/config.json: is a file, but a checkpoint is a folder");
  write_file(folder / "config.json", "{}");
  EXPECT_TRUE(input_error_of([&] {
                load_checkpoint(folder.path());
              }).starts_with(path + "/config.json: d_model is missing"));
  write_file(folder / "config.json", std::string((1 << 20) + 1, ' '));
  EXPECT_EQ(input_error_of([&] { load_checkpoint(folder.path()); }),
            path + "/config.json: has 1048577 bytes, more than the 1048576 that it may have");
}

TEST(CheckpointErrors, TruncatedAndDamagedFiles) {
  const Folder folder;
  const std::string whole = read_file(folder.weights());
  for (const size_t size :
       {size_t{0}, size_t{7}, size_t{100}, whole.size() / 2, whole.size() - 1}) {
    write_file(folder.weights(), whole.substr(0, size));
    const std::string error = folder.error();
    EXPECT_TRUE(error.find("truncated") != std::string::npos ||
                error == fmt::format("{} bytes are too few for a safetensors file", size))
        << error;
  }
  fs::remove(folder.weights());
  std::string torch = torch_file(views_of(folder.tensors()), true);
  write_file(folder.path() / "pytorch_model.bin", torch.substr(0, torch.size() - 100));
  EXPECT_EQ(folder.error("pytorch_model.bin"),
            "no end of a zip archive: the file is truncated, or is no zip archive");
  torch[torch.size() / 2] = static_cast<char>(torch[torch.size() / 2] + 1);
  write_file(folder.path() / "pytorch_model.bin", torch);
  EXPECT_NE(folder.error("pytorch_model.bin").find("the file is damaged"), std::string::npos);
}

TEST(CheckpointErrors, MissingTensors) {
  const Folder one([](auto& views) { views.erase(views.begin() + 3); });
  EXPECT_EQ(one.error(),
            "lacks 1 tensor that config.json asks for: backbone.layers.0.mixer.dt_bias. Do the two "
            "belong together?");
  const Folder many([](auto& views) {
    views.resize(1);
    views[0].name = "model.embedding";
  });
  EXPECT_EQ(many.error(),
            "lacks 26 tensors that config.json asks for: backbone.embedding.weight, "
            "backbone.layers.0.norm.weight, backbone.layers.0.mixer.in_proj.weight, "
            "backbone.layers.0.mixer.dt_bias, backbone.layers.0.mixer.B_bias and 21 more; it has: "
            "\"model.embedding\". Do the two belong together?");
}

TEST(CheckpointErrors, WrongShapes) {
  const auto error_with = [](const std::string& name, std::initializer_list<int64_t> dims) {
    const Folder folder([&](auto& views) {
      NamedView& changed = find(views, name);
      changed.view = make_view(changed.view.data, changed.view.dtype, dims);
    });
    return folder.error();
  };
  EXPECT_EQ(error_with("backbone.layers.1.norm.weight", {3}),
            "backbone.layers.1.norm.weight has the shape (3), but config.json makes it (4)");
  EXPECT_EQ(error_with("backbone.layers.0.mixer.B_bias", {2, 4}),
            "backbone.layers.0.mixer.B_bias has the shape (2, 4), but config.json makes it "
            "(2, 1, 4)");
  EXPECT_EQ(error_with(kEmbedding, {12, 4}),
            "backbone.embedding.weight has the shape (12, 4), but config.json makes it (16, 4)");
  EXPECT_EQ(error_with(kEmbedding, {10}),
            "backbone.embedding.weight has the shape (10), but config.json makes it (16, 4)");
}

TEST(CheckpointErrors, WrongTypes) {
  std::array<int32_t, 4> integers{};
  const Folder folder([&](auto& views) {
    find(views, "backbone.norm_f.weight").view = view_of(integers.data(), {4});
  });
  EXPECT_EQ(folder.error(), "backbone.norm_f.weight is of type i32, which weights cannot be");
}

TEST(Checkpoint, WeightsInDoubleBecomeFloat) {
  std::array<double, 4> doubles{0.1, 0.2, 0.3, 0.4};
  const Folder folder([&](auto& views) {
    find(views, "backbone.norm_f.weight").view = view_of(doubles.data(), {4});
  });
  const Checkpoint got = folder.load();
  EXPECT_EQ(got.tensors.at("backbone.norm_f.weight").dtype, DType::f32);
  EXPECT_EQ(values_of(got.tensors.at("backbone.norm_f.weight")),
            (std::vector<double>{0.1f, 0.2f, 0.3f, 0.4f}));
}

TEST(Checkpoint, PadsTheVocabulary) {
  const Folder folder([](auto& views) { views[0].view = views[0].view.slice(0, 0, 10); });
  const Checkpoint got = folder.load();
  std::vector<double> want = values_of(folder.tensors().at(kEmbedding));
  std::fill(want.begin() + 10 * 4, want.end(), 0.0);
  EXPECT_EQ(got.tensors.at(kEmbedding).shape(), "(16, 4)");
  EXPECT_EQ(values_of(got.tensors.at(kEmbedding)), want);
  EXPECT_EQ(got.warnings, std::vector<std::string>{});
}

TEST(Checkpoint, WarnsOfExtraTensors) {
  const Folder folder([](auto& views) {
    views.push_back({"step", views.back().view});
    views.push_back({"backbone.layers.2.norm.weight", views.back().view});
  });
  EXPECT_EQ(folder.warnings(),
            (std::vector<std::string>{"ignored 2 tensors that the model does not have: "
                                      "\"backbone.layers.2.norm.weight\", \"step\""}));
  expect_same_tensors(folder.load().tensors, folder.tensors());
}

TEST(Checkpoint, ATiedHeadThatDiffersIsIgnored) {
  std::vector<float> head(16 * 4);
  const Folder different([&](auto& views) {
    views.push_back({"lm_head.weight", view_of(head.data(), {16, 4})});
  });
  EXPECT_EQ(different.warnings(),
            (std::vector<std::string>{"lm_head.weight differs from the embedding and is ignored, "
                                      "because tie_embeddings is true"}));
  EXPECT_FALSE(different.load().tensors.contains("lm_head.weight"));
  const Folder equal([](auto& views) { views.push_back({"lm_head.weight", views[0].view}); });
  EXPECT_EQ(equal.warnings(), std::vector<std::string>{});
}

TEST(Checkpoint, WarnsOfNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    const TempFolder folder;
    const NamedTensors tensors = parameters_of(siso(), dtype);
    testing::set_value(tensors.at(kEmbedding), 5, nan);
    testing::set_value(tensors.at(kEmbedding), 6, -infinity);
    testing::set_value(tensors.at("backbone.norm_f.weight"), 3, infinity);
    save_checkpoint(folder.path(), siso(), tensors);
    EXPECT_EQ(load_checkpoint(folder.path()).warnings,
              (std::vector<std::string>{(folder / "model.safetensors").string() +
                                        ": values that are NaN or infinite: "
                                        "backbone.embedding.weight (2 of 64), "
                                        "backbone.norm_f.weight (1 of 4)"}));
  }
}

TEST(Checkpoint, WarnsOfFewNamesOnly) {
  std::vector<float> nans(1 << 10, std::numeric_limits<float>::quiet_NaN());
  const Folder folder([&](auto& views) {
    for (NamedView& v : views) v.view.data = nans.data();
  });
  EXPECT_NE(folder.warnings().at(0).find(" and 21 more"), std::string::npos);
}

TEST(Checkpoint, ReadsTheFlaLayout) {
  const TempFolder folder;
  write_file(folder / "config.json",
             R"({"model_type": "mamba3", "hidden_size": 4, "state_size": 4, "head_dim": 4,
                 "num_hidden_layers": 2, "vocab_size": 10, "tie_word_embeddings": false})");
  Config config = siso();
  config.d_mlp = 0;
  config.tied = false;
  config.vocab_padded = 10;
  const NamedTensors tensors = parameters_of(config);
  std::vector<NamedView> views = views_of(tensors);
  views[0].name = "backbone.embeddings.weight";
  write_safetensors(folder / "model.safetensors", views);
  const Checkpoint got = load_checkpoint(folder.path());
  expect_same_tensors(got.tensors, tensors);
  EXPECT_EQ(got.config.layout, Layout::fla);
  EXPECT_EQ(got.warnings, std::vector<std::string>{});
}

// Goldens: the names and dims of the gradients in expected.safetensors are the reference's.
void expect_matches_golden(const fs::path& folder) {
  SCOPED_TRACE(folder);
  const Checkpoint checkpoint = load_checkpoint(folder);
  EXPECT_EQ(checkpoint.warnings, std::vector<std::string>{});
  std::map<std::string, std::string> want, got;
  const std::string prefix = "grad.";
  for (const StoredTensor& t : read_safetensors(folder / "expected.safetensors").tensors) {
    if (!t.name.starts_with(prefix)) continue;
    std::string name = t.name.substr(prefix.size());
    if (name == "backbone.embeddings.weight") name = kEmbedding;
    want[name] = t.view.shape();
  }
  for (const std::string& name : checkpoint.tensors.names()) {
    got[name] = checkpoint.tensors.at(name).shape();
  }
  EXPECT_EQ(got, want);

  const TempFolder copy;
  save_checkpoint(copy.path(), checkpoint.config, checkpoint.tensors);
  expect_same_tensors(load_checkpoint(copy.path()).tensors, checkpoint.tensors);
}

TEST(Checkpoint, LoadsTheGolden) {
  expect_matches_golden(fs::path(MAMBA3_TEST_DATA) / "goldens/siso-odd");
}

TEST(Checkpoint, LoadsEveryGolden) {
  const fs::path goldens = fs::path(MAMBA3_SHARED) / "goldens";
  if (!fs::is_directory(goldens)) GTEST_SKIP() << goldens << " is absent";
  for (const auto& folder : fs::directory_iterator(goldens)) expect_matches_golden(folder.path());
}

}  // namespace
}  // namespace mamba3
