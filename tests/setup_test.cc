#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "support/program.h"

namespace mamba3 {
namespace {

namespace fs = std::filesystem;

// dpkg-query -W -f=FORMAT NAME...
const std::string kQuery = "shift 2; for name; do ";

// Runs scripts/setup with stand-ins for the programs that it calls.
class SetupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "mamba3-setup-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    stand_in("dpkg-query", kQuery + "[ $name = libhwy-dev ] || echo $name installed; done");
    stand_in("apt-get", "echo apt-get $* >>" + log());
    stand_in("apt-cache", "true");
    stand_in("id", "echo 0");
    stand_in("sudo", "exit 1");
  }
  void TearDown() override { fs::remove_all(folder_); }

  void stand_in(const std::string& program, const std::string& body) {
    const fs::path path = folder_ / program;
    std::ofstream(path) << "#!/bin/sh\n" << body << "\n";
    fs::permissions(path, fs::perms::owner_all);
  }

  std::string log() const { return (folder_ / "log").string(); }

  std::string calls() const {
    std::ostringstream text;
    text << std::ifstream(log()).rdbuf();
    return text.str();
  }

  testing::ProgramResult setup(const std::string& group = "build") const {
    const std::string path = "PATH=" + folder_.string() + ":" + std::getenv("PATH");
    return testing::run_command({"/usr/bin/env", path, MAMBA3_SCRIPTS "/setup", group});
  }

  fs::path folder_;
};

constexpr const char* kInstall = "apt-get install -y --no-install-recommends libhwy-dev\n";

TEST_F(SetupTest, NothingMissingTouchesNothing) {
  stand_in("dpkg-query", kQuery + "echo $name installed; done");
  const testing::ProgramResult result = setup();
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(result.out + result.err, "");
  EXPECT_EQ(calls(), "");
}

TEST_F(SetupTest, InstallsOnlyWhatIsMissing) {
  EXPECT_EQ(setup().exit_code, 0);
  EXPECT_EQ(calls(), kInstall);
}

TEST_F(SetupTest, RemovedPackagesWithConfigurationLeftAreMissing) {
  stand_in("dpkg-query", kQuery +
                             "[ $name = libhwy-dev ] && echo $name config-files ||"
                             " echo $name installed; done");
  EXPECT_EQ(setup().exit_code, 0);
  EXPECT_EQ(calls(), kInstall);
}

TEST_F(SetupTest, UnknownPackagesNeedFreshLists) {
  stand_in("apt-cache", "exit 100");
  EXPECT_EQ(setup().exit_code, 0);
  EXPECT_EQ(calls(), std::string("apt-get update\n") + kInstall);
}

TEST_F(SetupTest, FailingInstallationIsTriedOnceMoreWithFreshLists) {
  stand_in("apt-get", "echo apt-get $* >>" + log() + "; [ $1 = update ] && touch " + log() +
                          ".new; [ -e " + log() + ".new ]");
  EXPECT_EQ(setup().exit_code, 0);
  EXPECT_EQ(calls(), kInstall + std::string("apt-get update\n") + kInstall);
  stand_in("apt-get", "exit 100");
  EXPECT_NE(setup().exit_code, 0);
}

TEST_F(SetupTest, WithoutRightsNamesTheCommand) {
  stand_in("id", "echo 1000");
  const testing::ProgramResult result = setup();
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(calls(), "");
  EXPECT_NE(result.err.find("sudo apt-get update && sudo apt-get install"), std::string::npos)
      << result.err;
  EXPECT_NE(result.err.find("libhwy-dev"), std::string::npos) << result.err;
}

TEST_F(SetupTest, UsesSudoThatAsksForNoPassword) {
  stand_in("id", "echo 1000");
  stand_in("sudo", "[ $1 = -n ] && shift && exec \"$@\"");
  EXPECT_EQ(setup().exit_code, 0);
  EXPECT_EQ(calls(), kInstall);
}

TEST_F(SetupTest, UnknownGroupIsAnError) {
  const testing::ProgramResult result = setup("kitchen");
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.err, "setup: no group 'kitchen' in scripts/packages\n");
}

}  // namespace
}  // namespace mamba3
