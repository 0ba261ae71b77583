#include "train/metrics.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace mamba3 {
namespace {

namespace fs = std::filesystem;

class Metrics : public ::testing::Test {
 protected:
  Metrics() { fs::create_directories(folder_); }
  ~Metrics() override { fs::remove_all(folder_); }

  std::vector<nlohmann::json> lines() const {
    std::vector<nlohmann::json> rows;
    std::ifstream in(file_);
    for (std::string line; std::getline(in, line);) rows.push_back(nlohmann::json::parse(line));
    return rows;
  }

  fs::path folder_ = fs::temp_directory_path() / ("mamba3-metrics-" + std::to_string(getpid()));
  fs::path file_ = folder_ / "metrics.jsonl";
};

TEST_F(Metrics, RowsAreJsonAndAbsentValuesAreLeftOut) {
  MetricsLog log(file_, 0);
  log.append({.step = 1, .tokens = 64, .loss = 5.5451774, .lr = 1e-5, .grad_norm = 2});
  log.append({.step = 2,
              .loss = std::numeric_limits<double>::infinity(),
              .skipped = true,
              .val_loss = 1.25,
              .sample = "a \"b\"\n\xff"});
  const auto rows = lines();
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0]["loss"].get<double>(), 5.54518);
  EXPECT_EQ(rows[0]["lr"].get<double>(), 1e-5);
  EXPECT_FALSE(rows[0].contains("val_loss"));
  EXPECT_FALSE(rows[0].contains("skipped"));
  EXPECT_TRUE(rows[1]["loss"].is_null());
  EXPECT_TRUE(rows[1]["skipped"].get<bool>());
  EXPECT_EQ(rows[1]["val_loss"].get<double>(), 1.25);
  EXPECT_EQ(rows[1]["sample"].get<std::string>(), "a \"b\"\n\xEF\xBF\xBD");
}

TEST_F(Metrics, ContinuingRemovesLaterAndCutLines) {
  {
    MetricsLog log(file_, 0);
    for (int step = 1; step <= 5; ++step) log.append({.step = step, .loss = 1});
  }
  std::ofstream(file_, std::ios::app) << "{\"step\":6,\"lo";
  {
    MetricsLog log(file_, 5);  // only the cut line goes
    EXPECT_EQ(lines().size(), 5u);
  }
  MetricsLog log(file_, 3);
  log.append({.step = 4, .loss = 2});
  const auto rows = lines();
  ASSERT_EQ(rows.size(), 4u);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(rows[i]["step"].get<size_t>(), i + 1);
  EXPECT_EQ(rows[3]["loss"].get<int>(), 2);
}

TEST_F(Metrics, UnwritablePlacesAreErrors) {
  EXPECT_THROW(MetricsLog(folder_ / "absent" / "metrics.jsonl", 0), Error);
  if (fs::exists("/dev/full")) {
    fs::create_symlink("/dev/full", file_);
    EXPECT_THROW(MetricsLog(file_, 0).append({.step = 1}), Error);
  }
}

}  // namespace
}  // namespace mamba3
