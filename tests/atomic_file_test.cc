#include "formats/atomic_file.h"

#include <gtest/gtest.h>

#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"

namespace mamba3 {
namespace {

using testing::error_of;
using testing::FileSizeLimit;
using testing::read_file;
using testing::TempFolder;
using testing::write_file;

size_t files_in(const TempFolder& folder) {
  return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder.path()), {}));
}

TEST(AtomicFile, AppearsWhenCommitted) {
  const TempFolder folder;
  {
    AtomicFile file(folder / "file");
    file.write("new ");
    file.write("content");
    EXPECT_FALSE(std::filesystem::exists(folder / "file"));
    file.sync();
    EXPECT_FALSE(std::filesystem::exists(folder / "file"));
    file.commit();
    EXPECT_EQ(read_file(folder / "file"), "new content");
  }
  EXPECT_EQ(read_file(folder / "file"), "new content");
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, ReplacesAtOnce) {
  const TempFolder folder;
  write_file(folder / "file", "old");
  AtomicFile file(folder / "file");
  file.write("new");
  EXPECT_EQ(read_file(folder / "file"), "old");
  file.commit();
  EXPECT_EQ(read_file(folder / "file"), "new");
}

TEST(AtomicFile, LeavesNothingUnlessCommitted) {
  const TempFolder folder;
  write_file(folder / "file", "old");
  {
    AtomicFile file(folder / "file");
    file.write("new");
    file.sync();
  }
  EXPECT_EQ(read_file(folder / "file"), "old");
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, OldContentSurvivesAFullDisk) {
  const TempFolder folder;
  write_file(folder / "file", "old");
  {
    const FileSizeLimit limit(1000);
    AtomicFile file(folder / "file");
    EXPECT_EQ(error_of([&] { file.write(std::string(2000, 'x')); }),
              "cannot write " + (folder / "file").string() +
                  ": File too large; what was there before is unchanged");
  }
  EXPECT_EQ(read_file(folder / "file"), "old");
  EXPECT_EQ(files_in(folder), 1u);
}

TEST(AtomicFile, NamesTheReason) {
  const TempFolder folder;
  const auto path = folder / "absent/file";
  EXPECT_EQ(error_of([&] { AtomicFile{path}; }),
            "cannot create " + path.string() +
                ": No such file or directory; what was there before is unchanged");
  std::filesystem::create_directories(folder / "full/inner");
  EXPECT_EQ(error_of([&] {
              AtomicFile file(folder / "full");
              file.commit();
            }),
            "cannot replace " + (folder / "full").string() +
                ": Is a directory; what was there before is unchanged");
}

TEST(AtomicFile, WorksInTheCurrentFolder) {
  const TempFolder folder;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(folder.path());
  AtomicFile file("file");
  file.write("here");
  file.commit();
  std::filesystem::current_path(before);
  EXPECT_EQ(read_file(folder / "file"), "here");
}

}  // namespace
}  // namespace mamba3
