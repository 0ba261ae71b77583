#include "train/study_report.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <type_traits>

#include "formats/text_file.h"
#include "train/svg.h"

namespace mamba3 {

namespace {

using nlohmann::ordered_json;

constexpr std::string_view kPaperColour = "#8c959f", kOurColour = "#1f6feb";
constexpr std::string_view kColours[] = {"#1f6feb", "#8250df", "#bc4c00",
                                         "#d1242f", "#1a7f37", "#57606a"};

std::string percent(double accuracy) {
  return fmt::format("{:.2f}", 100 * accuracy);
}

std::string percent(const std::optional<double>& accuracy) {
  return accuracy ? percent(*accuracy) : "";
}

template <typename Value>
std::string flag_value(const Value& value) {
  if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
    return fmt::format("{}", fmt::join(value, ","));
  } else {
    return fmt::format("{}", value);
  }
}

// Every finished cell, in the order of the grid.
std::vector<StudyCell> finished_cells(const StudyGrid& grid, const StudyResults& results) {
  std::vector<StudyCell> cells;
  const auto add = [&](const StudyCell& cell) {
    if (results.contains(cell.name())) cells.push_back(cell);
  };
  for (const StudyRow& row : study_table(grid, results)) {
    for (const StudyCell& cell : grid_cells(grid, row.task, row.system)) add(cell);
    if (!row.best_cell) continue;
    for (const StudyCell& cell : seed_cells(grid, *row.best_cell)) {
      if (cell.seed > 0) add(cell);
    }
  }
  return cells;
}

ordered_json json_of(const std::optional<double>& value) {
  return value ? ordered_json(*value) : ordered_json();
}

ordered_json json_of(const std::optional<StudyCurriculum>& c) {
  if (!c) return {};
  return {{"shortest", c->shortest}, {"min_length", c->min_length}, {"growth", c->growth}};
}

ordered_json json_of(const StudyGrid& g) {
  return {{"tasks", g.tasks},
          {"systems", g.systems},
          {"d_model", g.d_model},
          {"lr", g.lr},
          {"seeds", g.seeds},
          {"d_state", g.d_state},
          {"headdim", g.headdim},
          {"batch", g.batch},
          {"steps", g.steps > 0 ? ordered_json(g.steps) : ordered_json()},
          {"max_length", g.max_length},
          {"arithmetic", json_of(g.arithmetic)},
          {"val_length", g.val_length},
          {"val_rows", g.val_rows},
          {"val_every", g.val_every}};
}

ordered_json json_of(const StudyRow& row) {
  ordered_json json = {{"task", row.task},
                       {"system", row.system},
                       {"paper", json_of(row.paper)},
                       {"cells", row.cells},
                       {"cells_done", row.cells_done},
                       {"diverged", row.diverged},
                       {"best", row.best_cell ? ordered_json(row.best) : ordered_json()},
                       {"best_cell", row.best_cell ? row.best_cell->name() : ""},
                       {"median_of_seeds", json_of(row.median)},
                       {"lengths", ordered_json::array()}};
  for (const LengthMedian& l : row.by_length) {
    json["lengths"].push_back({{"length", l.length}, {"models", l.models}, {"median", l.accuracy}});
  }
  return json;
}

std::string median_of(int64_t seeds) {
  return seeds == 1 ? "with one seed" : fmt::format("median of {} seeds", seeds);
}

std::string runs_of(const StudyRow& row) {
  std::string text = fmt::format("{} of {}", row.cells_done, row.cells);
  if (row.diverged > 0) text += fmt::format(", {} diverged", row.diverged);
  return text;
}

// The rows of the table that belong to a task.
std::vector<StudyRow> rows_of(const std::vector<StudyRow>& table, const std::string& task) {
  std::vector<StudyRow> rows;
  std::copy_if(table.begin(), table.end(), std::back_inserter(rows),
               [&](const StudyRow& row) { return row.task == task; });
  return rows;
}

}  // namespace

std::string train_flags(const TrainSettings& settings) {
  const TrainSettings defaults = default_settings(settings.task, settings.mixer);
  std::vector<std::string> usual;
  visit_settings(defaults, [&](const SettingInfo&, const auto& member) {
    usual.push_back(flag_value(member));
  });
  std::string flags = fmt::format("--task {}", settings.task);
  auto before = usual.begin();
  visit_settings(settings, [&](const SettingInfo& info, const auto& member) {
    const std::string value = flag_value(member);
    if (*before++ == value) return;
    flags += fmt::format(" --{}", info.name);
    if constexpr (std::is_same_v<std::remove_cvref_t<decltype(member)>, bool>) {
      if (!member) flags += "=false";
    } else {
      flags += " " + value;
    }
  });
  return flags;
}

std::string results_json(const StudyGrid& grid, const StudyResults& results) {
  ordered_json json = {{"study", "state-tracking"},
                       {"accuracy", "scaled: 0 is guessing, 1 is all right"},
                       {"grid", json_of(grid)},
                       {"table", ordered_json::array()},
                       {"cells", ordered_json::array()}};
  for (const StudyRow& row : study_table(grid, results)) {
    json["table"].push_back(json_of(row));
  }
  for (const StudyCell& cell : finished_cells(grid, results)) {
    const TrainSettings settings = settings_of(grid, cell);
    const CellResult& result = results.at(cell.name());
    ordered_json one = {{"name", cell.name()}};
    one.update(ordered_json::parse(to_json(cell, settings, result)));
    one["command"] = fmt::format("mamba3 train {} --device {} --dtype {}", train_flags(settings),
                                 result.device, result.dtype);
    json["cells"].push_back(one);
  }
  return json.dump(2) + "\n";
}

std::string results_markdown(const StudyGrid& grid, const StudyResults& results) {
  const std::vector<StudyRow> table = study_table(grid, results);
  const StudyProgress progress = progress_of(grid, results);
  std::string text = fmt::format(
      "# State tracking\n\nScaled accuracy in percent at length {}: 0 is guessing, 100 all right. "
      "Best validation of each run;\n{} of {} runs are finished.\n",
      grid.val_length, progress.cells_done, progress.cells);
  for (const std::string& task : grid.tasks) {
    text += fmt::format(
        "\n## {}\n\n"
        "| system | paper | best of the grid | {} | its d_model | its lr | runs |\n"
        "|---|---|---|---|---|---|---|\n",
        study_task(task).title, median_of(grid.seeds));
    for (const StudyRow& row : rows_of(table, task)) {
      const bool any = row.best_cell.has_value();
      text += fmt::format("| {} | {} | {} | {} | {} | {} | {} |\n", study_system(row.system).title,
                          percent(row.paper), any ? percent(row.best) : "", percent(row.median),
                          any ? fmt::format("{}", row.best_cell->d_model) : "",
                          any ? fmt::format("{:g}", row.best_cell->lr) : "", runs_of(row));
    }
  }
  std::vector<int64_t> lengths = grid.other_lengths();
  lengths.push_back(grid.val_length);
  std::sort(lengths.begin(), lengths.end());
  text += fmt::format(
      "\n## By length\n\nOf the best setting's seeds: the median of the accuracies of the models "
      "after the last update, on {} sequences of each\nlength. Longer ones than {} are for models "
      "whose best validation is at least {:.0f}.\n\n| task | system | {} |\n|---|---|{}\n",
      kTriedCount, grid.val_length, 100 * kSolved, fmt::join(lengths, " | "),
      fmt::join(std::vector<std::string>(lengths.size(), "---|"), ""));
  for (const StudyRow& row : table) {
    if (row.by_length.empty()) continue;
    text += fmt::format("| {} | {} |", study_task(row.task).title, study_system(row.system).title);
    for (const int64_t length : lengths) {
      const auto found = std::ranges::find(row.by_length, length, &LengthMedian::length);
      text += fmt::format(" {} |", found == row.by_length.end() ? "" : percent(found->accuracy));
    }
    text += "\n";
  }
  return text;
}

std::string results_svg(const StudyGrid& grid, const StudyResults& results) {
  constexpr double kWidth = 760, kLeft = 190, kRight = 70, kTop = 50;
  constexpr double kTitle = 30, kRow = 34, kBar = 12, kGap = 24;
  const double block = kTitle + kRow * static_cast<double>(grid.systems.size()) + kGap;
  const double height = kTop + block * static_cast<double>(grid.tasks.size());
  const auto x_at = [&](double accuracy) {
    return kLeft + (kWidth - kLeft - kRight) * std::clamp(accuracy, 0.0, 1.0);
  };
  Svg svg(kWidth, height);
  svg.text(20, 22, fmt::format("Scaled accuracy at length {}, %", grid.val_length),
           Svg::Anchor::start, Svg::kInk, /*bold=*/true);
  svg.rectangle(330, 12, 12, 12, kPaperColour);
  svg.text(348, 22, "paper");
  svg.rectangle(410, 12, 12, 12, kOurColour);
  svg.text(428, 22, "ours, best of the grid");
  svg.circle(590, 18, 4, Svg::kInk);
  svg.text(600, 22, median_of(grid.seeds));
  const std::vector<StudyRow> table = study_table(grid, results);
  double y = kTop;
  for (const std::string& task : grid.tasks) {
    svg.text(20, y + 14, study_task(task).title, Svg::Anchor::start, Svg::kInk, /*bold=*/true);
    const double bottom = y + block - kGap;
    for (const int tick : {0, 25, 50, 75, 100}) {
      const double x = x_at(tick / 100.0);
      svg.line(x, y + kTitle - 8, x, bottom);
      svg.text(x, bottom + 14, fmt::format("{}", tick), Svg::Anchor::middle);
    }
    double row_y = y + kTitle;
    for (const StudyRow& row : rows_of(table, task)) {
      svg.text(kLeft - 8, row_y + kBar + 4, study_system(row.system).title, Svg::Anchor::end);
      const auto bar = [&](double top, const std::optional<double>& accuracy,
                           std::string_view colour) {
        if (!accuracy) return;
        svg.rectangle(kLeft, top, std::max(1.0, x_at(*accuracy) - kLeft), kBar, colour);
        svg.text(kWidth - 10, top + kBar - 2, percent(*accuracy), Svg::Anchor::end, colour);
      };
      bar(row_y, row.paper, kPaperColour);
      bar(row_y + kBar + 2, row.best_cell ? std::optional(row.best) : std::nullopt, kOurColour);
      if (row.median) svg.circle(x_at(*row.median), row_y + 1.5 * kBar + 2, 4, Svg::kInk);
      row_y += kRow;
    }
    y += block;
  }
  return svg.finish();
}

std::string rates_svg(const StudyGrid& grid, const StudyResults& results) {
  constexpr double kWidth = 760, kLeft = 50, kRight = 210, kTop = 30, kPanel = 200, kBelow = 70;
  Svg svg(kWidth, kTop + (kPanel + kBelow) * static_cast<double>(grid.tasks.size()));
  const double low = *std::min_element(grid.lr.begin(), grid.lr.end());
  const double high = *std::max_element(grid.lr.begin(), grid.lr.end());
  const auto x_at = [&](double lr) {
    const double part = low < high ? std::log(lr / low) / std::log(high / low) : 0.5;
    return kLeft + 10 + (kWidth - kLeft - kRight - 20) * part;
  };
  const int64_t widest = *std::max_element(grid.d_model.begin(), grid.d_model.end());
  double top = kTop;
  for (const std::string& task : grid.tasks) {
    const auto y_at = [&](double accuracy) {
      return top + kPanel * (1 - std::clamp(accuracy, 0.0, 1.0));
    };
    svg.text(kLeft, top - 12, study_task(task).title, Svg::Anchor::start, Svg::kInk,
             /*bold=*/true);
    for (const int tick : {0, 25, 50, 75, 100}) {
      const double y = y_at(tick / 100.0);
      svg.line(kLeft, y, kWidth - kRight, y);
      svg.text(kLeft - 8, y + 4, fmt::format("{}", tick), Svg::Anchor::end);
    }
    for (const double lr : grid.lr) {
      svg.text(x_at(lr), top + kPanel + 18, fmt::format("{:g}", lr), Svg::Anchor::middle);
    }
    svg.text((kLeft + kWidth - kRight) / 2, top + kPanel + 36, "learning rate",
             Svg::Anchor::middle);
    double legend = top + 10;
    for (size_t i = 0; i < grid.systems.size(); ++i) {
      const std::string& system = grid.systems[i];
      const std::string_view colour = kColours[i % std::size(kColours)];
      for (const int64_t d_model : grid.d_model) {
        std::vector<std::pair<double, double>> points;
        for (StudyCell& cell : grid_cells(grid, task, system)) {
          const auto found = results.find(cell.name());
          if (cell.d_model != d_model || found == results.end()) continue;
          points.emplace_back(cell.lr, found->second.best);
        }
        std::sort(points.begin(), points.end());
        for (auto& [x, y] : points) {
          x = x_at(x);
          y = y_at(y);
          svg.circle(x, y, 3, colour);
        }
        if (points.size() > 1) svg.path(points, colour, /*dashed=*/d_model != widest);
      }
      svg.text(kWidth - kRight + 12, legend, study_system(system).title, Svg::Anchor::start,
               colour);
      legend += 20;
    }
    svg.text(kWidth - kRight + 12, legend, fmt::format("line: D {}; dashes: others", widest));
    top += kPanel + kBelow;
  }
  return svg.finish();
}

void write_reports(const std::filesystem::path& folder, const StudyGrid& grid,
                   const StudyResults& results) {
  for (const auto& [name, text] : {std::pair{"results.json", results_json(grid, results)},
                                   {"results.md", results_markdown(grid, results)},
                                   {"results.svg", results_svg(grid, results)},
                                   {"lr.svg", rates_svg(grid, results)}}) {
    write_text_file(folder / name, text);
  }
}

}  // namespace mamba3
