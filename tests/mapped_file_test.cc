#include "formats/mapped_file.h"

#include <gtest/gtest.h>

#include "support/errors.h"
#include "support/files.h"
#include "support/temp_folder.h"

namespace mamba3 {
namespace {

using testing::input_error_of;
using testing::TempFolder;
using testing::write_file;

TEST(MappedFile, HoldsTheBytesOfTheFile) {
  const TempFolder folder;
  const std::string text = std::string(5000, 'x') + "end";
  write_file(folder / "file", text);
  const MappedFile file(folder / "file");
  const std::string_view got(reinterpret_cast<const char*>(file.bytes().data()),
                             file.bytes().size());
  EXPECT_EQ(got, text);
}

TEST(MappedFile, StaysWhenTheNameGoes) {
  const TempFolder folder;
  write_file(folder / "file", "text");
  const MappedFile file(folder / "file");
  std::filesystem::remove(folder / "file");
  EXPECT_EQ(static_cast<char>(file.bytes()[3]), 't');
}

TEST(MappedFile, MayBeEmpty) {
  const TempFolder folder;
  write_file(folder / "file", "");
  EXPECT_TRUE(MappedFile(folder / "file").bytes().empty());
}

TEST(MappedFile, RefusesWhatIsNoFile) {
  const TempFolder folder;
  EXPECT_EQ(input_error_of([&] { MappedFile{folder / "absent"}; }),
            "cannot read " + (folder / "absent").string() + ": No such file or directory");
  EXPECT_EQ(input_error_of([&] { MappedFile{folder.path()}; }),
            "cannot read " + folder.path().string() + ": not a regular file");
}

}  // namespace
}  // namespace mamba3
