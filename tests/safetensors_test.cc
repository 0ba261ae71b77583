#include "formats/safetensors.h"

#include <gtest/gtest.h>

#include <array>
#include <cstring>

#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"
#include "support/tensor.h"

namespace mamba3 {
namespace {

using testing::bytes_of;
using testing::error_of;
using testing::FileSizeLimit;
using testing::input_error_of;
using testing::raw;
using testing::read_file;
using testing::TempFolder;
using testing::Tensor;
using testing::values_of;
using testing::write_file;

// A file as the format describes it, made by hand.
std::string file_of(std::string_view header, std::string_view data) {
  return raw<uint64_t>(header.size()) + std::string(header) + std::string(data);
}

std::string error_reading(const std::string& file) {
  return input_error_of([&] { read_safetensors(bytes_of(file), nullptr, "file"); });
}

std::string error_with_header(std::string_view header, size_t data_bytes = 8) {
  return error_reading(file_of(header, std::string(data_bytes, '\0')));
}

TEST(Safetensors, ReadsAFileMadeByHand) {
  const std::string file = file_of(
      R"({"__metadata__": {"format": "pt"}, "b": {"dtype": "I32", "shape": [], "data_offsets":)"
      R"( [8, 12]}, "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}})",
      raw(1.5f) + raw(-2.0f) + raw<int32_t>(7));
  const TensorFile got = read_safetensors(bytes_of(file), nullptr, "file");
  ASSERT_EQ(got.tensors.size(), 2u);
  EXPECT_EQ(got.tensors[0].name, "a");  // the order of the data
  EXPECT_EQ(got.at("a").shape(), "(1, 2)");
  EXPECT_EQ(values_of(got.at("a")), (std::vector<double>{1.5, -2}));
  EXPECT_EQ(got.at("b").rank, 0);
  EXPECT_EQ(*got.at("b").as<int32_t>(), 7);
  EXPECT_EQ(got.metadata.at("format"), "pt");
  EXPECT_EQ(input_error_of([&] { (void)got.at("c"); }), "there is no tensor \"c\" in the file");
}

TEST(Safetensors, WritesWhatItReads) {
  const TempFolder folder;
  testing::Random random(1);
  const Tensor f32 = Tensor::normal(random, {3, 5});
  const Tensor bf16 = Tensor::normal(random, {7}, 1, DType::bf16);
  const Tensor f16 = Tensor::normal(random, {3}, 1, DType::f16);
  const Tensor i32 = Tensor::integers(random, {4}, -9, 9);
  const std::array<double, 4> f64{0.1, -2, 3e300, 4};
  const std::array<int64_t, 2> i64{1, int64_t{-1} << 40};
  const std::array<uint8_t, 3> u8{0, 7, 255};
  const Tensor none = Tensor::zeros({0, 4});
  const std::vector<NamedView> written = {{"u8", view_of(u8.data(), {3})},
                                          {"bf16", bf16},
                                          {"f32", f32},
                                          {"f16", f16},
                                          {"f64", view_of(f64.data(), {2, 1, 2})},
                                          {"none", none},
                                          {"i32", i32},
                                          {"i64", view_of(i64.data(), {2})}};
  write_safetensors(folder / "file", written, {{"key", "value"}});

  const TensorFile got = read_safetensors(folder / "file");
  EXPECT_EQ(got.metadata, (std::map<std::string, std::string>{{"key", "value"}}));
  ASSERT_EQ(got.tensors.size(), written.size());
  EXPECT_EQ(got.tensors[0].name, "f64");  // larger elements first, and so all in place, aligned
  EXPECT_EQ(got.tensors.back().name, "u8");
  for (const auto& [name, view] : written) {
    SCOPED_TRACE(name);
    const View& read = got.at(name);
    EXPECT_EQ(read.dtype, view.dtype);
    EXPECT_EQ(read.shape(), view.shape());
    EXPECT_EQ(std::memcmp(read.data, view.data, static_cast<size_t>(view.bytes())), 0);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(read.data) % static_cast<size_t>(size_of(view.dtype)),
              0u);
  }
}

TEST(Safetensors, WritesTheSameBytesAsTheFormatsOwnLibrary) {
  const TempFolder folder;
  const Tensor a = Tensor::of({2}, std::vector<double>{1, 2});
  write_safetensors(folder / "file", std::vector<NamedView>{{"a", a}}, {{"format", "pt"}});
  EXPECT_EQ(read_file(folder / "file"),
            file_of(R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],)"
                    R"("data_offsets":[0,8]}}   )",
                    raw(1.0f) + raw(2.0f)));
}

TEST(Safetensors, TensorsOutliveTheFile) {
  const TempFolder folder;
  const Tensor a = Tensor::of({2}, std::vector<double>{1, 2});
  write_safetensors(folder / "file", std::vector<NamedView>{{"a", a}});
  StoredTensor kept;
  {
    TensorFile file = read_safetensors(folder / "file");
    kept = file.tensors[0];
  }
  EXPECT_EQ(values_of(kept.view), (std::vector<double>{1, 2}));
}

TEST(Safetensors, CopiesWhatIsNotAligned) {
  const std::string file = file_of(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                   R"("b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}})",
                                   "x" + raw(1.0f) + raw(2.0f));
  const TensorFile got = read_safetensors(bytes_of(file), nullptr, "file");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(got.at("b").data) % 4, 0u);
  EXPECT_EQ(values_of(got.at("b")), (std::vector<double>{1, 2}));
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const std::string file =
      file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", raw(1.0f) + raw(2.0f));
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_NE(error_reading(file.substr(0, size)), "nothing thrown") << size;
  }
  EXPECT_EQ(error_reading("1234567"), "file: 7 bytes are too few for a safetensors file");
  EXPECT_EQ(error_reading(file.substr(0, 20)),
            "file: the header has 54 bytes, but only 12 are there: the file is truncated");
  EXPECT_EQ(error_reading(file.substr(0, file.size() - 1)),
            "file: \"a\" ends at byte 8 of the data, which have only 7: the file is truncated or "
            "damaged");
}

TEST(Safetensors, RefusesDamagedHeaders) {
  EXPECT_EQ(error_reading(raw<uint64_t>(1ull << 60) + "{}"),
            "file: the header's length, 1152921504606846976, is above 33554432: not a safetensors "
            "file, or damaged");
  EXPECT_NE(error_with_header("{\"a\":").find("file: the header is not valid JSON: "),
            std::string::npos);
  EXPECT_EQ(error_with_header("[]"), "file: the header must be a JSON object");
  EXPECT_EQ(error_with_header("[[[[]]]]"), "file: the header is nested too deeply");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[[[2]]],"data_offsets":[0,8]}})"),
            "file: the header is nested too deeply");
  EXPECT_EQ(error_with_header(R"({"__metadata__":{"a":1}})"),
            "file: __metadata__ must be an object of strings");
}

TEST(Safetensors, RefusesDamagedEntries) {
  EXPECT_EQ(error_with_header(R"({"a":3})"), "file: the entry of \"a\" must be an object");
  EXPECT_EQ(error_with_header(R"({"a":{"shape":[2],"data_offsets":[0,8]}})"),
            "file: the entry of \"a\" has no dtype");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}})"),
            "file: the dtype of \"a\" is \"F8_E4M3\", which is not supported (F32, BF16, F16, F64, "
            "I32, I64 and U8 are)");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})"),
            "file: shape of \"a\" must be an array of non-negative integers");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}})"),
            "file: shape of \"a\" must be an array of non-negative integers");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,1e3]}})"),
            "file: data_offsets of \"a\" must be an array of non-negative integers");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})"),
            "file: data_offsets of \"a\" must be [begin, end] with begin <= end");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}})"),
            "file: data_offsets of \"a\" must be [begin, end] with begin <= end");
  EXPECT_EQ(error_with_header(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})"),
            "file: \"a\" has 8 bytes of data, but its shape and dtype need 12");
  // 2^62 * 4 bytes is 0 modulo 2^64.
  EXPECT_EQ(error_with_header(
                R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})"),
            "file: the shape of \"a\" is too large or has more than 6 dims");
  EXPECT_EQ(
      error_with_header(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1],"data_offsets":[0,1]}})", 1),
      "file: the shape of \"a\" is too large or has more than 6 dims");
}

TEST(Safetensors, RefusesTwoTensorsOfOneName) {
  const char* entry = R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  EXPECT_EQ(error_with_header(fmt::format("{{{},{}}}", entry, entry)),
            "file: there are two tensors \"a\"");
}

TEST(Safetensors, RefusesOverlapsAndGaps) {
  const auto two = [](int b_begin, int b_end, size_t data) {
    return error_with_header(
        fmt::format(R"({{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},)"
                    R"("b":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}}}})",
                    b_begin, b_end),
        data);
  };
  EXPECT_EQ(two(8, 12, 12), "nothing thrown");
  EXPECT_EQ(two(4, 8, 12), "file: \"b\" overlaps \"a\"");
  EXPECT_EQ(two(12, 16, 16), "file: 4 unused bytes before \"b\"");
  EXPECT_EQ(two(8, 12, 13), "file: 1 unused bytes at the end");
}

TEST(Safetensors, OldFileSurvivesAFullDisk) {
  const TempFolder folder;
  const Tensor old_tensor = Tensor::zeros({3});
  const Tensor new_tensor = Tensor::zeros({1000});
  write_safetensors(folder / "file", std::vector<NamedView>{{"a", old_tensor}});
  {
    const FileSizeLimit limit(1000);
    const std::string error = error_of([&] {
      write_safetensors(folder / "file", std::vector<NamedView>{{"a", new_tensor}});
    });
    EXPECT_NE(error.find("File too large; what was there before is unchanged"), std::string::npos)
        << error;
  }
  EXPECT_EQ(read_safetensors(folder / "file").at("a").dim(0), 3);
}

TEST(Safetensors, RefusesToWriteWhatItCannot) {
  const TempFolder folder;
  const Tensor a = Tensor::zeros({4, 4});
  EXPECT_EQ(
      error_of([&] {
        write_safetensors(folder / "file", std::vector<NamedView>{{"a", a.view().slice(1, 0, 2)}});
      }),
      "[write_safetensors] \"a\" must be contiguous");
  EXPECT_EQ(error_of([&] {
              write_safetensors(folder / "file", std::vector<NamedView>{{"a", a}, {"a", a}});
            }),
            "[write_safetensors] there are two tensors \"a\"");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

TEST(Safetensors, ReadsTheGoldens) {
  const std::filesystem::path folder = std::filesystem::path(MAMBA3_SHARED) / "goldens/fla-siso";
  if (!std::filesystem::is_directory(folder)) GTEST_SKIP() << folder << " is absent";
  const TensorFile expected = read_safetensors(folder / "expected.safetensors");
  EXPECT_EQ(expected.tensors.size(), 33u);
  EXPECT_EQ(expected.at("logits").shape(), "(2, 75, 256)");
  EXPECT_EQ(expected.at("input_ids").dtype, DType::i32);
}

}  // namespace
}  // namespace mamba3
