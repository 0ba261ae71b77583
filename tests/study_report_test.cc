#include "train/study_report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

#include "support/errors.h"
#include "support/files.h"
#include "support/study.h"
#include "support/temp_folder.h"
#include "train/svg.h"

namespace mamba3 {
namespace {

using testing::make_result;
using testing::tiny_study;

// What is wrong with a text as XML of elements, attributes in double quotes and words; empty if
// nothing is.
std::string xml_problem(std::string_view xml) {
  std::vector<std::string> open;
  bool root = false;
  while (!xml.empty()) {
    if (xml.front() != '<') {
      const std::string_view words = xml.substr(0, xml.find('<'));
      for (size_t at = words.find('&'); at != words.npos; at = words.find('&', at + 1)) {
        const std::string_view entity = words.substr(at, words.find(';', at) - at + 1);
        if (entity != "&amp;" && entity != "&lt;" && entity != "&gt;") return "bare &";
      }
      if (words.find('>') != words.npos) return "bare >";
      if (open.empty() && words.find_first_not_of("\n ") != words.npos) return "words outside";
      xml.remove_prefix(words.size());
      continue;
    }
    const size_t end = xml.find('>');
    if (end == xml.npos) return "unclosed tag";
    std::string_view tag = xml.substr(1, end - 1);
    xml.remove_prefix(end + 1);
    if (tag.find('<') != tag.npos) return "< within a tag";
    if (std::count(tag.begin(), tag.end(), '"') % 2 != 0) return "odd quotes";
    const std::string name(tag.substr(0, tag.find_first_of(" /", 1)));
    if (tag.starts_with('/')) {
      if (open.empty() || "/" + open.back() != name) return "closes " + name;
      open.pop_back();
    } else {
      if (open.empty() && std::exchange(root, true)) return "two roots";
      if (!tag.ends_with('/')) open.push_back(name);
    }
  }
  return !root ? "empty" : open.empty() ? "" : "not closed: " + open.back();
}

size_t count(std::string_view text, std::string_view part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
  return n;
}

// Two tasks, three systems, two rates; one system without a result, one that is finished.
class Reports : public ::testing::Test {
 protected:
  Reports() {
    grid_.tasks = {"parity", "modular_arithmetic"};
    grid_.systems = {"mamba3", "mamba3_mimo", "mamba2"};
    const auto cells = grid_cells(grid_, "parity", "mamba3");
    results_[cells[0].name()] = make_result(0.4321, 0.25, 6);
    results_[cells[1].name()] = make_result(0.9876, 0.75, 5);
    results_[cells[0].name()].diverged = true;
    for (StudyCell& cell : seed_cells(grid_, cells[1])) {
      if (cell.seed > 0) results_[cell.name()] = make_result(0.5 + 0.01 * cell.seed, 0.5, 6);
    }
    results_[cells[1].name()].lengths = {
        {4, 256, 0.875}, {16, 256, 0.625}, {32, 256, 0.5}, {128, 256, 0.125}};
    StudyCell other = cells[1];
    other.seed = 1;
    results_[other.name()].lengths = {{4, 256, 0.625}};
    results_[grid_cells(grid_, "modular_arithmetic", "mamba2")[0].name()] =
        make_result(-0.0625, -0.125, 6);
  }

  StudyGrid grid_ = tiny_study();
  StudyResults results_;
};

TEST_F(Reports, MarkdownHasTheNumbersInTheirPlaces) {
  const std::string text = results_markdown(grid_, results_);
  for (const char* line :
       {"at length 8:", "5 of 24 runs are finished",
        "| system | paper | best of the grid | median of 3 seeds | its d_model | its lr | runs |",
        "| Mamba-3 (SISO) | 100.00 | 98.76 | 52.00 | 16 | 0.002 | 2 of 2, 1 diverged |",
        "| Mamba-3 (MIMO, R = 4) |  |  |  |  |  | 0 of 2 |",
        "| Mamba-2 | 47.81 | -6.25 |  | 16 | 0.001 | 1 of 2 |", "## By length",
        "| task | system | 4 | 8 | 16 | 32 | 128 |",
        "| Parity | Mamba-3 (SISO) | 75.00 | 62.50 | 62.50 | 50.00 | 12.50 |"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "\n" << text;
  }
  // Every row of a table has the columns of its head.
  std::istringstream lines(text);
  ptrdiff_t columns = 0;
  for (std::string line; std::getline(lines, line);) {
    const auto bars = std::count(line.begin(), line.end(), '|');
    if (bars > 0 && columns > 0) {
      EXPECT_EQ(bars, columns) << line;
    }
    columns = bars;
  }
}

TEST_F(Reports, JsonHasEveryCellWithItsSettings) {
  const auto json = nlohmann::json::parse(results_json(grid_, results_));
  ASSERT_EQ(json["table"].size(), 6u);
  EXPECT_EQ(json["table"][0]["best"], 0.9876);
  EXPECT_EQ(json["table"][0]["best_cell"], "parity/mamba3/d16-lr0.002-seed0");
  EXPECT_EQ(json["table"][0]["median_of_seeds"], 0.52);
  ASSERT_EQ(json["table"][0]["lengths"].size(), 5u);
  EXPECT_EQ(json["table"][0]["lengths"][1]["length"], 8);
  EXPECT_EQ(json["table"][0]["lengths"][1]["models"], 2);
  EXPECT_EQ(json["table"][0]["lengths"][1]["median"], 0.625);
  EXPECT_EQ(json["table"][0]["lengths"][4]["length"], 128);
  EXPECT_EQ(json["table"][0]["lengths"][4]["models"], 1);
  EXPECT_EQ(json["table"][0]["lengths"][4]["median"], 0.125);
  EXPECT_TRUE(json["table"][1]["best"].is_null());
  EXPECT_TRUE(json["table"][1]["paper"].is_null());
  EXPECT_EQ(json["grid"]["lr"].size(), 2u);
  ASSERT_EQ(json["cells"].size(), 5u);
  for (const auto& cell : json["cells"]) {
    const StudyCell key{.task = cell["task"],
                        .system = cell["system"],
                        .d_model = cell["d_model"],
                        .lr = cell["lr"],
                        .seed = cell["seed"]};
    EXPECT_EQ(cell["name"], key.name());
    EXPECT_EQ(to_json(parse_settings(cell["settings"].dump())), to_json(settings_of(grid_, key)));
    EXPECT_EQ(cell["best"], results_.at(key.name()).best);
  }
  EXPECT_EQ(json["cells"][0]["diverged"], true);
  EXPECT_EQ(json["cells"][1]["lengths"][1]["accuracy"], 0.625);
}

TEST(StudyCommand, NamesWhatDiffersFromTheDefaults) {
  const StudyGrid grid = full_study();
  TrainSettings s = default_settings("parity");
  EXPECT_EQ(train_flags(s), "--task parity");
  s = settings_of(grid, {.task = "modular_arithmetic",
                         .system = "gated_deltanet",
                         .d_model = 32,
                         .lr = 0.000193,
                         .seed = 2});
  const std::string flags = train_flags(s);
  for (const char* part :
       {"--task modular_arithmetic", " --mixer gated_deltanet", " --negative-eigenvalues",
        " --lr 0.000193", " --seed 2", " --d-model 32", " --batch 256"}) {
    EXPECT_NE(flags.find(part), std::string::npos) << part << " in " << flags;
  }
  // Are the defaults, that of dt with this mixer.
  EXPECT_EQ(flags.find("--layers"), std::string::npos) << flags;
  EXPECT_EQ(flags.find("--dt-m"), std::string::npos) << flags;
  EXPECT_EQ(flags.find("true"), std::string::npos) << flags;
  s.untied = false;  // where the default is true
  EXPECT_NE(train_flags(s).find(" --untied=false"), std::string::npos);
  s.mixer = {"mamba2", "attention"};
  EXPECT_NE(train_flags(s).find(" --mixer mamba2,attention"), std::string::npos);
}

TEST_F(Reports, PicturesAreWellFormedAndComplete) {
  for (const std::string& svg : {results_svg(grid_, results_), rates_svg(grid_, results_),
                                 results_svg(grid_, {}), rates_svg(grid_, {})}) {
    EXPECT_EQ(xml_problem(svg), "") << svg;
    EXPECT_EQ(count(svg, "nan"), 0u);
    EXPECT_EQ(count(svg, "inf"), 0u);
    EXPECT_EQ(count(svg, "fill=\"white\""), 1u);  // its own ground
    EXPECT_EQ(count(svg, ">Modular arithmetic without brackets<"), 1u);
  }
  const std::string bars = results_svg(grid_, results_);
  EXPECT_EQ(count(bars, ">Mamba-2<"), 2u);
  EXPECT_EQ(count(bars, ">98.76<"), 1u);
  EXPECT_EQ(count(bars, ">47.81<"), 1u);
  EXPECT_EQ(count(bars, ">-6.25<"), 1u);
  EXPECT_EQ(count(bars, "<circle"), 2u);  // the legend, and the one median that there is
  // Four bars of the paper and two of ours, and their legends; as long as the numbers say.
  EXPECT_EQ(count(bars, "height=\"12.0\" fill=\"#8c959f\""), 5u);
  EXPECT_EQ(count(bars, "height=\"12.0\" fill=\"#1f6feb\""), 3u);
  EXPECT_EQ(count(bars, "width=\"500.0\" height=\"12.0\" fill=\"#8c959f\""), 1u);  // 100%
  EXPECT_EQ(count(bars, "width=\"493.8\" height=\"12.0\" fill=\"#1f6feb\""), 1u);  // 98.76%
  EXPECT_EQ(count(bars, "width=\"1.0\" height=\"12.0\" fill=\"#1f6feb\""), 1u);    // below 0

  const std::string rates = rates_svg(grid_, results_);
  EXPECT_EQ(count(rates, "<circle"), 3u);
  EXPECT_EQ(count(rates, ">0.002<"), 2u);
  grid_.lr = {0.002};  // a single rate has a place too
  EXPECT_EQ(xml_problem(rates_svg(grid_, results_)), "");
  EXPECT_EQ(count(rates_svg(grid_, results_), "nan"), 0u);
}

TEST(SvgTest, EscapesWords) {
  Svg svg(10, 10);
  svg.text(1, 2, "a<b & c>d");
  EXPECT_EQ(xml_problem(svg.finish()), "");
  EXPECT_NE(svg.finish().find(">a&lt;b &amp; c&gt;d<"), std::string::npos);
  // The check itself.
  EXPECT_EQ(xml_problem("<a><b/></a>"), "");
  EXPECT_NE(xml_problem("<a><b></a>"), "");
  EXPECT_NE(xml_problem("<a>x & y</a>"), "");
  EXPECT_NE(xml_problem("<a/><b/>"), "");
  EXPECT_NE(xml_problem("<a c=\"></a>"), "");
  EXPECT_NE(xml_problem("<a>"), "");
}

TEST_F(Reports, AreWrittenTogether) {
  const testing::TempFolder folder;
  write_reports(folder.path(), grid_, results_);
  EXPECT_EQ(testing::read_file(folder / "results.json"), results_json(grid_, results_));
  EXPECT_EQ(testing::read_file(folder / "results.md"), results_markdown(grid_, results_));
  EXPECT_EQ(testing::read_file(folder / "results.svg"), results_svg(grid_, results_));
  EXPECT_EQ(testing::read_file(folder / "lr.svg"), rates_svg(grid_, results_));
  EXPECT_NE(testing::error_of([&] {
              write_reports(folder / "absent", grid_, results_);
            }).find("cannot create"),
            std::string::npos);
}

}  // namespace
}  // namespace mamba3
