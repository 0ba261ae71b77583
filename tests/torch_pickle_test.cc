#include "formats/torch_pickle.h"

#include <gtest/gtest.h>

#include <limits>

#include "formats/safetensors.h"
#include "formats/torch_file.h"
#include "support/archives.h"
#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

using testing::bytes_of;
using testing::input_error_of;
using testing::Pickle;
using testing::pickle_of;
using testing::raw;
using testing::TempFolder;
using testing::torch_file_of;
using testing::values_of;
using testing::write_file;
using testing::zip_of;

std::vector<TorchTensor> unpickle(const std::string& pickle) {
  return unpickle_state_dict(bytes_of(pickle), "model.bin");
}

std::string error_of_pickle(const std::string& pickle) {
  return input_error_of([&] { unpickle(pickle); });
}

// The error without the byte at which it was found.
std::string reason_of_pickle(const std::string& pickle) {
  const std::string error = error_of_pickle(pickle);
  const std::string before = " of the pickle: ";
  const size_t at = error.find(before);
  return at == std::string::npos ? error : error.substr(at + before.size());
}

TorchTensor weight() {
  return {.name = "weight",
          .storage = "0",
          .dtype = DType::bf16,
          .storage_size = 20,
          .offset = 2,
          .dims = {3, 4},
          .strides = {4, 1}};
}

TEST(TorchPickle, ReadsAStateDict) {
  TorchTensor bias = weight();
  bias.name = "bias";
  bias.dtype = DType::f32;
  bias.storage = "17";
  bias.dims = bias.strides = {};
  const std::vector<TorchTensor> got = unpickle(pickle_of({weight(), bias}));
  ASSERT_EQ(got.size(), 2u);
  EXPECT_EQ(got[0].name, "weight");
  EXPECT_EQ(got[0].storage, "0");
  EXPECT_EQ(got[0].dtype, DType::bf16);
  EXPECT_EQ(got[0].storage_size, 20);
  EXPECT_EQ(got[0].offset, 2);
  EXPECT_EQ(got[0].dims, (std::vector<int64_t>{3, 4}));
  EXPECT_EQ(got[0].strides, (std::vector<int64_t>{4, 1}));
  EXPECT_EQ(got[1].name, "bias");
  EXPECT_EQ(got[1].storage, "17");
  EXPECT_TRUE(got[1].dims.empty());
}

TEST(TorchPickle, KnowsTheStorageTypes) {
  for (const DType dtype :
       {DType::f32, DType::bf16, DType::f16, DType::f64, DType::i32, DType::i64, DType::u8}) {
    TorchTensor tensor = weight();
    tensor.dtype = dtype;
    EXPECT_EQ(unpickle(pickle_of({tensor}))[0].dtype, dtype);
  }
}

// What torch writes for an OrderedDict with the attribute _metadata, which nn.Module adds.
TEST(TorchPickle, ReadsAnOrderedDictWithAttributes) {
  Pickle pickle;
  pickle.global("collections", "OrderedDict") << ")Rq\x01(";
  pickle.string("weight").tensor_call(weight()) << "Ru}";
  pickle.string("_metadata").global("collections", "OrderedDict") << ")R";
  pickle.string("") << "}";
  pickle.string("version") << "K\x01sssb";
  EXPECT_EQ(unpickle(pickle.end()).size(), 1u);
}

TEST(TorchPickle, ReadsParameters) {
  Pickle pickle;
  pickle << "}";
  pickle.string("weight").global("torch._utils", "_rebuild_parameter") << "(";
  pickle.tensor_call(weight()) << "R\x88";
  pickle.global("collections", "OrderedDict") << ")RtRs";
  EXPECT_EQ(unpickle(pickle.end()).at(0).dims, (std::vector<int64_t>{3, 4}));
}

TEST(TorchPickle, ReadsTheOpcodesOfProtocol4) {
  // PROTO 4, FRAME, memoised strings, STACK_GLOBAL, SHORT_BINUNICODE, BINUNICODE8, BININT and None.
  std::string pickle = "\x80\x04\x95" + raw(uint64_t{99}) + "}\x94";
  const auto text = [](std::string_view s) {
    return "\x8c" + raw(static_cast<uint8_t>(s.size())) + std::string(s) + "\x94";
  };
  pickle += "(\x8d" + raw(uint64_t{6}) + "weight";
  pickle += text("torch._utils") + text("_rebuild_tensor_v2") + "\x93\x94((";
  pickle += text("storage") + text("torch") + text("HalfStorage") + "\x93" + text("key") +
            text("cpu") + "J" + raw(int32_t{6}) + "tQK\x01";
  pickle += "M" + raw(uint16_t{5}) + "\x85K\x01\x85\x89Nj" + raw(uint32_t{0}) + "tR";
  pickle += "u.";
  const std::vector<TorchTensor> got = unpickle(pickle);
  ASSERT_EQ(got.size(), 1u);
  EXPECT_EQ(got[0].dtype, DType::f16);
  EXPECT_EQ(got[0].storage, "key");
  EXPECT_EQ(got[0].offset, 1);
  EXPECT_EQ(got[0].dims, (std::vector<int64_t>{5}));
}

TEST(TorchPickle, RefusesForeignGlobals) {
  // What a hostile pickle does: os.system("...").
  Pickle pickle;
  pickle.global("posix", "system").string("true") << "\x85R";
  EXPECT_EQ(error_of_pickle(pickle.end()),
            "model.bin: byte 2 of the pickle: \"posix.system\" is not one of the globals that a "
            "state dict needs, and is not imported");
  for (const auto& [module, name] :
       {std::pair("builtins", "eval"), std::pair("torch", "load"), std::pair("torch", "system"),
        std::pair("collections", "deque"), std::pair("torch", "CharStorage"),
        std::pair("torch._utils", "_rebuild_tensor"), std::pair("", "")}) {
    EXPECT_EQ(reason_of_pickle(Pickle().global(module, name).end()),
              fmt::format("\"{}.{}\" is not one of the globals that a state dict needs, and is not "
                          "imported",
                          module, name));
  }
  Pickle stack_global;
  stack_global.string("os").string("system") << "\x93";
  EXPECT_NE(error_of_pickle(stack_global.end()).find("\"os.system\""), std::string::npos);
}

TEST(TorchPickle, RefusesForeignOpcodes) {
  EXPECT_EQ(error_of_pickle("\x80\x02(S'ls'\nios\nsystem\n."),
            "model.bin: byte 3 of the pickle: opcode 0x53 (STRING) is not one that a state dict "
            "needs, and is not executed");
  EXPECT_EQ(error_of_pickle("\x80\x02(ios\nsystem\n."),
            "model.bin: byte 3 of the pickle: opcode 0x69 (INST) is not one that a state dict "
            "needs, and is not executed");
  EXPECT_EQ(error_of_pickle("\x80\x02\xff"),
            "model.bin: byte 2 of the pickle: opcode 0xff (unknown to pickle) is not one that a "
            "state dict needs, and is not executed");
  EXPECT_NE(error_of_pickle("\x80\x04}}\x81.").find("(NEWOBJ)"), std::string::npos);
}

TEST(TorchPickle, EveryOpcodeIsKnownOrRefused) {
  for (int opcode = 0; opcode < 256; ++opcode) {
    const std::string error = error_of_pickle(std::string(1, static_cast<char>(opcode)));
    EXPECT_TRUE(error.starts_with("model.bin: byte ")) << opcode << ": " << error;
  }
}

TEST(TorchPickle, EveryTruncationIsAnError) {
  const std::string pickle = pickle_of({weight()});
  for (size_t size = 0; size < pickle.size(); ++size) {
    EXPECT_EQ(reason_of_pickle(pickle.substr(0, size)), "the pickle ends too early") << size;
  }
}

TEST(TorchPickle, SurvivesAnyDamagedByte) {
  const std::string pickle = pickle_of({weight()});
  for (size_t at = 0; at < pickle.size(); ++at) {
    for (int value = 0; value < 256; value += 7) {
      std::string damaged = pickle;
      damaged[at] = static_cast<char>(value);
      const std::string error = error_of_pickle(damaged);
      EXPECT_TRUE(error == "nothing thrown" || error.starts_with("model.bin: ")) << error;
    }
  }
}

TEST(TorchPickle, RefusesWhatIsNoStateDict) {
  EXPECT_EQ(reason_of_pickle("\x80\x02)."), "what was saved is no state dict");
  EXPECT_EQ(reason_of_pickle((Pickle() << "}").string("step").integer(3).operator<<("s").end()),
            "the entry \"step\" is no tensor: save model.state_dict() and nothing else");
  EXPECT_EQ(reason_of_pickle((Pickle() << "}").integer(3).operator<<("Ns").end()),
            "the type of a key of the state dict is wrong");
  EXPECT_EQ(reason_of_pickle(pickle_of({weight(), weight()})), "there are two tensors \"weight\"");
  EXPECT_EQ(reason_of_pickle("\x80\x01."), "pickle protocol 1 is not supported");
  EXPECT_EQ(reason_of_pickle("\x80\x06."), "pickle protocol 6 is not supported");
}

TEST(TorchPickle, RefusesMisuseOfTheMachine) {
  const std::string start = "\x80\x02";
  EXPECT_EQ(reason_of_pickle(start + "."), "the stack is empty");
  EXPECT_EQ(reason_of_pickle(start + "}(."), "the stack is empty");  // not past the mark
  EXPECT_EQ(reason_of_pickle(start + "q\x01."), "the stack is empty");
  EXPECT_EQ(reason_of_pickle(start + "}t."), "there is no mark on the stack");
  EXPECT_EQ(reason_of_pickle(start + "h\x01."), "the memo has no value 1");
  EXPECT_EQ(reason_of_pickle(start + "}(Nu."), "a key has no value");
  EXPECT_EQ(reason_of_pickle(start + ")NNs."), "the type of what items are set in is wrong");
  EXPECT_EQ(reason_of_pickle(start + "}Na."), "the type of what is appended to is wrong");
  EXPECT_EQ(reason_of_pickle(start + "N)R."), "the type of what is called is wrong");
  EXPECT_EQ(reason_of_pickle(start + "N}R."), "the type of a call's arguments is wrong");
  EXPECT_EQ(reason_of_pickle(start + "NNb."), "the type of an object with attributes is wrong");
  EXPECT_EQ(reason_of_pickle(start + ")Q."), "a persistent id is no storage");
  EXPECT_EQ(reason_of_pickle(start + "NQ."), "the type of a persistent id is wrong");
  EXPECT_EQ(reason_of_pickle(start + "\x8a\x09" + std::string(9, 'x') + "."),
            "an integer of 9 bytes is too large");
  EXPECT_EQ(reason_of_pickle((Pickle().global("collections", "OrderedDict") << "(NtR").end()),
            "OrderedDict with arguments is not supported");
  EXPECT_EQ(reason_of_pickle((Pickle().global("torch._utils", "_rebuild_parameter") << ")R").end()),
            "_rebuild_parameter needs a tensor");
  EXPECT_EQ(reason_of_pickle((Pickle().global("torch._utils", "_rebuild_tensor_v2") << ")R").end()),
            "a tensor with 0 arguments");
}

TEST(TorchPickle, BoundsWhatItAllocates) {
  EXPECT_EQ(reason_of_pickle("\x80\x02" + std::string((1 << 20) + 1, ')') + "."),
            "the pickle has more than 1048576 values");
  EXPECT_EQ(reason_of_pickle("\x80\x02)" + std::string((1 << 20) + 1, '\x94') + "."),
            "the memo has more than 1048576 values");
  // A list that holds itself, and nesting a hundred thousand deep.
  EXPECT_EQ(reason_of_pickle("\x80\x02]q\x01h\x01"
                             "a."),
            "what was saved is no state dict");
  EXPECT_EQ(reason_of_pickle("\x80\x02)" + std::string(100000, '\x85') + "."),
            "what was saved is no state dict");
}

TEST(TorchPickle, TensorsMustFitTheirStorage) {
  const auto reason = [](auto change) {
    TorchTensor tensor = weight();
    change(tensor);
    return reason_of_pickle(pickle_of({tensor}));
  };
  EXPECT_EQ(reason([](TorchTensor& t) { t.offset = 8; }), "nothing thrown");
  EXPECT_EQ(reason([](TorchTensor& t) { t.offset = 9; }),
            "a tensor of shape (3, 4), strides (4, 1) and offset 9 does not fit its storage of 20 "
            "elements, repeats elements or has more than 6 dims");
  EXPECT_EQ(reason([](TorchTensor& t) {
              t.offset = t.storage_size = 0;
              t.dims = {2, 0};
              t.strides = {1, 1};
            }),
            "nothing thrown");
  const auto refused = [&](auto change) {
    return reason(change).find("does not fit its storage") != std::string::npos;
  };
  const int64_t huge = int64_t{1} << 62;
  EXPECT_TRUE(refused([](TorchTensor& t) { t.offset = -1; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.dims = {-3, 4}; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.strides = {-4, 1}; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.strides = {4}; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.storage_size = 10; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.storage_size = -10; }));
  EXPECT_TRUE(refused([](TorchTensor& t) { t.dims = {6, 4}; }));
  EXPECT_TRUE(refused([&](TorchTensor& t) { t.strides = {huge, 1}; }));
  EXPECT_TRUE(refused([&](TorchTensor& t) { t.dims = {huge, huge}; }));
  EXPECT_TRUE(refused([&](TorchTensor& t) { t.offset = std::numeric_limits<int64_t>::max(); }));
  EXPECT_TRUE(refused([&](TorchTensor& t) { t.storage_size = huge; }));
  // One element shown 2^40 times is no use, and a copy of it a bomb.
  EXPECT_TRUE(refused([](TorchTensor& t) {
    t.dims = {int64_t{1} << 40};
    t.strides = {0};
  }));
  EXPECT_TRUE(refused([](TorchTensor& t) {
    t.dims = {1, 1, 1, 1, 1, 1, 1};
    t.strides = {1, 1, 1, 1, 1, 1, 1};
  }));
}

// Whole files.

// Elements 0, 1, 2, ... as f32.
std::string counting(int n) {
  std::string bytes;
  for (int i = 0; i < n; ++i) bytes += raw(static_cast<float>(i));
  return bytes;
}

TorchTensor f32_tensor(std::string name, int64_t offset, std::vector<int64_t> dims,
                       std::vector<int64_t> strides) {
  return {.name = std::move(name),
          .storage = "0",
          .dtype = DType::f32,
          .storage_size = 6,
          .offset = offset,
          .dims = std::move(dims),
          .strides = std::move(strides)};
}

TensorFile read(const std::string& file) {
  return read_torch(bytes_of(file), nullptr, "model.bin");
}

std::string error_of_file(const std::string& file) {
  return input_error_of([&] { read(file); });
}

TEST(TorchFile, ReadsTensorsPackedOrNot) {
  for (const bool deflate : {false, true}) {
    const std::string file =
        torch_file_of({f32_tensor("a", 0, {2, 3}, {3, 1}), f32_tensor("b", 4, {2}, {1})},
                      {{"0", counting(6)}}, deflate);
    TensorFile got = read(file);
    EXPECT_EQ(got.at("a").shape(), "(2, 3)");
    EXPECT_EQ(values_of(got.at("a")), (std::vector<double>{0, 1, 2, 3, 4, 5}));
    EXPECT_EQ(values_of(got.at("b")), (std::vector<double>{4, 5}));
  }
}

TEST(TorchFile, TensorsOutliveTheFile) {
  const TempFolder folder;
  for (const bool deflate : {false, true}) {
    write_file(folder / "model.bin",
               torch_file_of({f32_tensor("a", 0, {6}, {1})}, {{"0", counting(6)}}, deflate));
    const StoredTensor kept = read_torch(folder / "model.bin").tensors.at(0);
    EXPECT_EQ(values_of(kept.view), (std::vector<double>{0, 1, 2, 3, 4, 5}));
  }
}

TEST(TorchFile, SharedStoragesStayShared) {
  const std::string file =
      torch_file_of({f32_tensor("a", 0, {2, 3}, {3, 1}), f32_tensor("b", 0, {2, 3}, {3, 1})},
                    {{"0", counting(6)}}, true);
  const TensorFile got = read(file);
  EXPECT_EQ(got.at("a").data, got.at("b").data);
}

TEST(TorchFile, MakesStridedTensorsDense) {
  const std::string file = torch_file_of(
      {f32_tensor("transposed", 0, {3, 2}, {1, 3}), f32_tensor("columns", 1, {2, 2}, {3, 1}),
       f32_tensor("none", 0, {0, 2}, {7, 7})},
      {{"0", counting(6)}});
  const TensorFile got = read(file);
  EXPECT_TRUE(got.at("transposed").contiguous());
  EXPECT_EQ(values_of(got.at("transposed")), (std::vector<double>{0, 3, 1, 4, 2, 5}));
  EXPECT_EQ(values_of(got.at("columns")), (std::vector<double>{1, 2, 4, 5}));
  EXPECT_EQ(got.at("none").size(), 0);
}

TEST(TorchFile, StridedCopiesAreBounded) {
  std::vector<TorchTensor> tensors;
  for (int i = 0; i < 1000; ++i) {
    tensors.push_back(f32_tensor(std::to_string(i), 0, {100, 99}, {1, 100}));
    tensors.back().storage_size = 10000;
  }
  EXPECT_EQ(error_of_file(torch_file_of(tensors, {{"0", counting(10000)}})),
            "model.bin: its strided tensors need more than twice the memory of the file");
}

TEST(TorchFile, NamesWhatIsWrong) {
  const TorchTensor a = f32_tensor("a", 0, {6}, {1});
  EXPECT_EQ(error_of_file("\x80\x02\x8a\x0a"),
            "model.bin: in the format of torch before 1.6: load "
            "it with a newer torch and save it again");
  EXPECT_EQ(error_of_file(""), "model.bin: not a file that torch.save wrote");
  EXPECT_EQ(error_of_file("version https://git-lfs"),
            "model.bin: not a file that torch.save wrote");
  EXPECT_EQ(error_of_file(zip_of({{"word/document.xml", "text"}})),
            "model.bin: has no data.pkl: it is a zip archive, but not torch's");
  EXPECT_EQ(error_of_file(zip_of({{"a/data.pkl", ""}, {"b/data.pkl", ""}})),
            "model.bin: has both \"a/data.pkl\" and \"b/data.pkl\"");
  EXPECT_EQ(error_of_file(torch_file_of({a}, {})),
            "model.bin: the data of \"a\", \"model/data/0\", are missing");
  EXPECT_EQ(error_of_file(torch_file_of({a}, {{"0", counting(5)}})),
            "model.bin: the data of \"a\" have 20 bytes, but 6 elements of f32 need 24");
  EXPECT_EQ(error_of_file(zip_of({{"m/data.pkl", pickle_of({})}, {"m/byteorder", "big"}})),
            "model.bin: its byte order is \"big\", only \"little\" is supported");
  EXPECT_EQ(error_of_file(zip_of({{"m/data.pkl", std::string((16 << 20) + 1, ')')}})),
            "model.bin: \"m/data.pkl\" has 16777217 bytes, more than the 16777216 that a state "
            "dict may have");
}

TEST(TorchFile, DamageAndTruncationShow) {
  const std::string file = torch_file_of({f32_tensor("a", 0, {6}, {1})}, {{"0", counting(6)}});
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_NE(error_of_file(file.substr(0, size)), "nothing thrown") << size;
  }
  std::string damaged = file;
  const size_t at = damaged.find(raw(5.0f));
  ASSERT_NE(at, std::string::npos);
  damaged[at] = 1;
  EXPECT_NE(error_of_file(damaged).find("the checksum of \"model/data/0\" does not match"),
            std::string::npos);
}

// Written by torch itself.
TEST(TorchFile, ReadsTheGoldens) {
  const std::filesystem::path folder = std::filesystem::path(MAMBA3_SHARED) / "goldens/siso-bf16";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << folder << " is absent";
  const TensorFile file = read_torch(folder / "pytorch_model.bin");
  EXPECT_EQ(file.at("backbone.embedding.weight").shape(), "(256, 64)");
  EXPECT_EQ(file.at("backbone.embedding.weight").dtype, DType::bf16);
  EXPECT_EQ(file.at("lm_head.weight").data, file.at("backbone.embedding.weight").data);
}

}  // namespace
}  // namespace mamba3
