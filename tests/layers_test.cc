#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "support/program.h"

namespace mamba3 {
namespace {

namespace fs = std::filesystem;

// What scripts/check_layers says of a source tree with one file.
class LayersTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "mamba3-layers-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
    fs::create_directories(root_ / "src");
    fs::create_directories(root_ / "include/mamba3");
  }
  void TearDown() override { fs::remove_all(root_); }

  // The offence in the file of this path with this line, or "" if there is none.
  std::string offence(const std::string& path, const std::string& line) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << line << "\n";
    const testing::ProgramResult result =
        testing::run_command({MAMBA3_SCRIPTS "/check_layers", root_.string()});
    EXPECT_EQ(result.exit_code, result.out.empty() ? 0 : 1) << result.err;
    fs::remove(root_ / path);
    return result.out;
  }

  fs::path root_;
};

TEST_F(LayersTest, FoldersBelowMayBeIncluded) {
  EXPECT_EQ(offence("src/ops/a.cc", "#include \"core/view.h\""), "");
  EXPECT_EQ(offence("src/ops/a.cc", "#include \"ops/a.h\""), "");
  EXPECT_EQ(offence("src/cli/a.cc", "#include \"train/batch.h\""), "");
  EXPECT_EQ(offence("src/core/a.h", "#include \"mamba3/error.h\""), "");
  EXPECT_EQ(offence("include/mamba3/a.h", "#include <string>"), "");
}

TEST_F(LayersTest, FoldersAboveMayNot) {
  EXPECT_EQ(offence("src/core/a.cc", "#include \"ops/a.h\""),
            "src/core/a.cc:1: src/core must not include ops/a.h, which is not below it\n");
  EXPECT_NE(offence("src/train/a.cc", "  #  include \"cli/progress.h\""), "");
  EXPECT_NE(offence("include/mamba3/a.h", "#include \"core/view.h\""), "");
}

TEST_F(LayersTest, BackendsDoNotSeeEachOther) {
  EXPECT_NE(offence("src/cpu/a.cc", "#include \"cuda/a.h\""), "");
  EXPECT_NE(offence("src/cuda/a.cu", "#include \"cpu/a.h\""), "");
}

TEST_F(LayersTest, CudaHeadersStayInCuda) {
  EXPECT_EQ(offence("src/cuda/a.cuh", "#include <cuda_runtime.h>"), "");
  EXPECT_EQ(offence("src/model/a.cc", "#include <cuda_runtime.h>"),
            "src/model/a.cc:1: includes cuda_runtime.h: only src/cuda sees CUDA headers\n");
}

TEST_F(LayersTest, HeadersIncludeNothingOfOtherProjects) {
  EXPECT_EQ(offence("src/formats/a.cc", "#include <nlohmann/json.hpp>"), "");
  EXPECT_EQ(offence("src/cpu/a-inl.h", "#include \"hwy/highway.h\""), "");
  EXPECT_EQ(offence("src/core/error.h", "#include <fmt/format.h>"), "");
  EXPECT_EQ(offence("src/formats/a.h", "#include <nlohmann/json.hpp>"),
            "src/formats/a.h:1: includes nlohmann/json.hpp: headers of other projects stay in .cc "
            "files\n");
  EXPECT_NE(offence("include/mamba3/a.h", "#include <fmt/format.h>"), "");
}

TEST_F(LayersTest, PathsAreWrittenOneWay) {
  EXPECT_NE(offence("src/ops/a.cc", "#include \"../core/view.h\""), "");
  EXPECT_NE(offence("src/ops/a.cc", "#include <core/view.h>"), "");
}

TEST_F(LayersTest, EveryFolderHasAPlace) {
  EXPECT_EQ(offence("src/misc/a.cc", ""),
            "src/misc/a.cc:1: folder misc has no place in the order of scripts/check_layers\n");
}

}  // namespace
}  // namespace mamba3
