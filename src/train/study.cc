#include "train/study.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "core/error.h"

namespace mamba3 {

namespace {

using nlohmann::ordered_json;

template <typename Row>
const Row& row_named(const std::vector<Row>& rows, std::string_view what, std::string_view name) {
  std::vector<std::string_view> names;
  for (const Row& row : rows) {
    if (row.name == name) return row;
    names.push_back(row.name);
  }
  input_error("unknown {} '{}' of the study: use {}", what, name, fmt::join(names, ", "));
}

// 8 rates from 1e-4 to 1e-2 with equal ratios, to three digits, so that what is printed is what is
// trained with.
std::vector<double> log_spaced_rates() {
  constexpr int kRates = 8;
  std::vector<double> rates;
  for (int i = 0; i < kRates; ++i) {
    rates.push_back(std::stod(fmt::format("{:.3g}", std::pow(10.0, -4 + 2.0 * i / (kRates - 1)))));
  }
  return rates;
}

template <typename Value>
void at_least_one(const char* flag, const std::vector<Value>& values) {
  if (values.empty()) input_error("the study needs at least one --{}", flag);
}

template <typename Visit>
void for_each_group(const StudyGrid& grid, Visit&& visit) {
  for (const std::string& task : grid.tasks) {
    for (const std::string& system : grid.systems) visit(task, system);
  }
}

ordered_json json_of(const std::vector<LengthResult>& lengths) {
  ordered_json json = ordered_json::array();
  for (const LengthResult& l : lengths) {
    json.push_back({{"length", l.length}, {"count", l.count}, {"accuracy", l.accuracy}});
  }
  return json;
}

CellResult result_of(const ordered_json& json) {
  CellResult result;
  json.at("best").get_to(result.best);
  json.at("last").get_to(result.last);
  json.at("updates").get_to(result.updates);
  json.at("seconds").get_to(result.seconds);
  json.at("diverged").get_to(result.diverged);
  json.at("device").get_to(result.device);
  json.at("dtype").get_to(result.dtype);
  // What is "longer" is of a version that did not try shorter ones.
  for (const ordered_json& l : json.contains("longer") ? json["longer"] : json.at("lengths")) {
    result.lengths.push_back({.length = l.at("length").get<int64_t>(),
                              .count = l.at("count").get<int64_t>(),
                              .accuracy = l.at("accuracy").get<double>()});
  }
  return result;
}

template <typename Value>
bool contains(const std::vector<Value>& values, const Value& value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// Of the grid, or of another seed of it.
bool belongs_to(const StudyGrid& grid, const StudyCell& cell) {
  return contains(grid.tasks, cell.task) && contains(grid.systems, cell.system) &&
         contains(grid.d_model, cell.d_model) && contains(grid.lr, cell.lr) &&
         cell.seed < static_cast<uint64_t>(grid.seeds);
}

}  // namespace

const std::vector<StudySystem>& study_systems() {
  static const std::vector<StudySystem> systems = {
      {"mamba3", "Mamba-3 (SISO)", [](TrainSettings&) {}},
      {"mamba3_mimo", "Mamba-3 (MIMO, R = 4)",
       [](TrainSettings& s) {
         s.mimo = true;
         s.rank = 4;
       }},
      {"mamba3_standard_rope", "Mamba-3, standard RoPE",
       [](TrainSettings& s) { s.rope = "standard"; }},
      {"mamba3_no_rope", "Mamba-3, no RoPE", [](TrainSettings& s) { s.rope = "none"; }},
      {"mamba2", "Mamba-2", [](TrainSettings& s) { s.mixer = {"mamba2"}; }},
      {"gated_deltanet", "Gated DeltaNet [-1, 1]",
       [](TrainSettings& s) {
         s.mixer = {"gated_deltanet"};
         s.negative_eigenvalues = true;
       }},
  };
  return systems;
}

const std::vector<StudyTask>& study_tasks() {
  static const std::vector<StudyTask> tasks = {
      {"parity", "Parity", 1, 10000, {.growth = 0.6}},
      {"modular_arithmetic",
       "Modular arithmetic without brackets",
       3,
       10000,
       {.shortest = 3, .min_length = 40, .growth = 0.6}},
      {"modular_arithmetic_brackets",
       "Modular arithmetic with brackets",
       3,
       30000,
       {.growth = 0.4}},
  };
  return tasks;
}

const StudySystem& study_system(std::string_view name) {
  return row_named(study_systems(), "system", name);
}

const StudyTask& study_task(std::string_view name) {
  return row_named(study_tasks(), "task", name);
}

std::optional<double> paper_accuracy(std::string_view task, std::string_view system) {
  struct Row {
    std::string_view system;
    double parity, arithmetic, brackets;  // percent
  };
  static constexpr Row rows[] = {{"mamba3", 100.00, 98.51, 87.75},
                                 {"mamba3_standard_rope", 1.56, 20.70, 2.62},
                                 {"mamba3_no_rope", 2.27, 1.49, 0.72},
                                 {"mamba2", 0.90, 47.81, 0.88},
                                 {"gated_deltanet", 100.00, 99.25, 93.50}};
  for (const Row& row : rows) {
    if (row.system != system) continue;
    if (task == "parity") return row.parity / 100;
    if (task == "modular_arithmetic") return row.arithmetic / 100;
    if (task == "modular_arithmetic_brackets") return row.brackets / 100;
  }
  return std::nullopt;
}

StudyGrid full_study() {
  StudyGrid grid;
  for (const StudyTask& task : study_tasks()) grid.tasks.push_back(task.name);
  for (const StudySystem& system : study_systems()) grid.systems.push_back(system.name);
  grid.d_model = {32, 64};
  grid.lr = log_spaced_rates();
  return grid;
}

StudyGrid reduced_study() {
  StudyGrid grid = full_study();
  grid.d_model = {32};
  grid.lr = {0.003};
  grid.seeds = 1;
  grid.batch = 32;
  grid.steps = 3000;
  grid.max_length = 32;
  grid.arithmetic = {.growth = 0.2};  // so few updates had better be long ones
  grid.val_length = 48;
  grid.val_rows = 512;
  grid.val_every = 100;
  return grid;
}

int64_t StudyGrid::steps_of(std::string_view task) const {
  return steps > 0 ? steps : study_task(task).steps;
}

void StudyGrid::check() const {
  at_least_one("task", tasks);
  at_least_one("system", systems);
  at_least_one("d-model", d_model);
  at_least_one("lr", lr);
  if (seeds < 1) input_error("--seeds must be at least 1, got {}", seeds);
  std::set<std::string> names;
  for_each_group(*this, [&](const std::string& task, const std::string& system) {
    for (const StudyCell& cell : grid_cells(*this, task, system)) {
      if (!names.insert(cell.name()).second) {
        input_error("the study has the cell {} twice: give each value once", cell.name());
      }
      const TrainSettings settings = settings_of(*this, cell);
      settings.check();
      model_config(settings, make_task(task)->vocab());
    }
  });
}

std::vector<int64_t> StudyGrid::other_lengths() const {
  constexpr int64_t kShortest = 3;  // of arithmetic, with an operator
  std::vector<int64_t> lengths;
  for (const int64_t part : {16, 8, 4, 2}) {
    if (val_length / part >= kShortest) lengths.push_back(val_length / part);
  }
  for (const int64_t times : {2, 4, 16}) lengths.push_back(times * val_length);
  return lengths;
}

std::string StudyCell::name() const {
  return fmt::format("{}/{}/d{}-lr{:g}-seed{}", task, system, d_model, lr, seed);
}

TrainSettings settings_of(const StudyGrid& grid, const StudyCell& cell) {
  const StudyTask& task = study_task(cell.task);
  TrainSettings system;
  study_system(cell.system).change(system);
  TrainSettings s = default_settings(task.name, system.mixer);
  s.layers = task.layers;
  s.d_model = cell.d_model;
  s.d_state = grid.d_state;
  s.headdim = grid.headdim;
  s.mlp = 0;
  s.lr = cell.lr;
  s.seed = cell.seed;
  s.batch = grid.batch;
  s.steps = grid.steps_of(cell.task);
  const StudyCurriculum curriculum =
      cell.task == "parity" ? task.curriculum : grid.arithmetic.value_or(task.curriculum);
  s.shortest = curriculum.shortest;
  s.min_length = curriculum.min_length;
  s.max_length = grid.max_length;
  s.growth = curriculum.growth;
  s.val_length = grid.val_length;
  s.val_rows = grid.val_rows;
  s.val_every = grid.val_every;
  s.target_accuracy = 1;
  study_system(cell.system).change(s);
  return s;
}

std::string to_json(const StudyCell& cell, const TrainSettings& settings,
                    const CellResult& result) {
  const ordered_json json = {{"task", cell.task},
                             {"system", cell.system},
                             {"d_model", cell.d_model},
                             {"lr", cell.lr},
                             {"seed", cell.seed},
                             {"best", result.best},
                             {"last", result.last},
                             {"updates", result.updates},
                             {"seconds", result.seconds},
                             {"diverged", result.diverged},
                             {"device", result.device},
                             {"dtype", result.dtype},
                             {"lengths", json_of(result.lengths)},
                             {"settings", ordered_json::parse(to_json(settings))}};
  return json.dump(2);
}

CellResult parse_result(std::string_view text, const TrainSettings& settings,
                        std::string_view source) {
  CellResult result;
  std::string recorded;
  try {
    const ordered_json json = ordered_json::parse(text);
    result = result_of(json);
    recorded = to_json(parse_settings(json.at("settings").dump()));
  } catch (const nlohmann::json::exception& problem) {
    input_error("{} is damaged: {}; remove it to train this cell again", source, problem.what());
  } catch (const InputError& problem) {
    input_error("{}: {}", source, problem.what());
  }
  if (recorded != to_json(settings)) {
    input_error("{} is of other settings than those of this study: choose another folder", source);
  }
  return result;
}

StudyResults parse_results(std::string_view text, const StudyGrid& grid, std::string_view source) {
  StudyResults results;
  try {
    const ordered_json json = ordered_json::parse(text);
    for (const ordered_json& one : json.at("cells")) {
      const StudyCell cell = {.task = one.at("task").get<std::string>(),
                              .system = one.at("system").get<std::string>(),
                              .d_model = one.at("d_model").get<int64_t>(),
                              .lr = one.at("lr").get<double>(),
                              .seed = one.at("seed").get<uint64_t>()};
      if (!belongs_to(grid, cell)) continue;
      // As text: settings that this version does not know are other settings.
      if (one.at("settings") != ordered_json::parse(to_json(settings_of(grid, cell)))) continue;
      results[cell.name()] = result_of(one);
    }
  } catch (const nlohmann::json::exception& problem) {
    input_error("{} is not the results.json of a study: {}", source, problem.what());
  }
  return results;
}

std::vector<StudyCell> grid_cells(const StudyGrid& grid, std::string_view task,
                                  std::string_view system) {
  std::vector<StudyCell> cells;
  for (const int64_t d_model : grid.d_model) {
    for (const double lr : grid.lr) {
      cells.push_back({.task = std::string(task),
                       .system = std::string(system),
                       .d_model = d_model,
                       .lr = lr,
                       .seed = 0});
    }
  }
  return cells;
}

std::optional<StudyCell> best_cell(const StudyGrid& grid, const StudyResults& results,
                                   std::string_view task, std::string_view system) {
  const auto rank = [](const CellResult& r) { return std::tuple(r.best, r.last, -r.updates); };
  std::optional<StudyCell> best;
  for (const StudyCell& cell : grid_cells(grid, task, system)) {
    const auto found = results.find(cell.name());
    if (found == results.end()) continue;
    if (!best || rank(found->second) > rank(results.at(best->name()))) best = cell;
  }
  return best;
}

std::vector<StudyCell> seed_cells(const StudyGrid& grid, const StudyCell& cell) {
  std::vector<StudyCell> cells(static_cast<size_t>(grid.seeds), cell);
  for (size_t i = 0; i < cells.size(); ++i) cells[i].seed = i;
  return cells;
}

bool all_finished(const StudyResults& results, const std::vector<StudyCell>& cells) {
  return std::all_of(cells.begin(), cells.end(),
                     [&](const StudyCell& cell) { return results.contains(cell.name()); });
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values.at((n - 1) / 2) + values.at(n / 2)) / 2;
}

std::vector<int64_t> lengths_to_try(const StudyGrid& grid, const CellResult& result) {
  std::vector<int64_t> lengths = grid.other_lengths();
  if (result.best < kSolved) std::erase_if(lengths, [&](int64_t l) { return l > grid.val_length; });
  return lengths;
}

std::vector<StudyJob> due_jobs(const StudyGrid& grid, const StudyResults& results) {
  std::vector<StudyJob> jobs;
  for_each_group(grid, [&](const std::string& task, const std::string& system) {
    const auto add_missing = [&](const std::vector<StudyCell>& cells) {
      for (const StudyCell& cell : cells) {
        if (!results.contains(cell.name())) jobs.push_back({StudyJob::Kind::train, cell});
      }
      return all_finished(results, cells);
    };
    if (!add_missing(grid_cells(grid, task, system))) return;
    const auto seeds = seed_cells(grid, *best_cell(grid, results, task, system));
    if (!add_missing(seeds)) return;
    for (const StudyCell& cell : seeds) {
      const CellResult& result = results.at(cell.name());
      if (result.lengths.empty() && !lengths_to_try(grid, result).empty()) {
        jobs.push_back({StudyJob::Kind::try_lengths, cell});
      }
    }
  });
  return jobs;
}

StudyProgress progress_of(const StudyGrid& grid, const StudyResults& results) {
  StudyProgress progress;
  const auto count = [&](const StudyCell& cell) {
    const auto found = results.find(cell.name());
    if (found == results.end()) return;
    ++progress.cells_done;
    progress.updates_done += found->second.updates;
  };
  for_each_group(grid, [&](const std::string& task, const std::string& system) {
    const auto cells = grid_cells(grid, task, system);
    const int64_t all = std::ssize(cells) + grid.seeds - 1, done_before = progress.cells_done;
    progress.cells += all;
    for (const StudyCell& cell : cells) count(cell);
    if (const std::optional<StudyCell> best = best_cell(grid, results, task, system)) {
      for (const StudyCell& cell : seed_cells(grid, *best)) {
        if (cell.seed > 0) count(cell);
      }
    }
    const int64_t left = all - (progress.cells_done - done_before);
    progress.updates_left += left * grid.steps_of(task);
  });
  return progress;
}

std::vector<StudyRow> study_table(const StudyGrid& grid, const StudyResults& results) {
  std::vector<StudyRow> rows;
  for_each_group(grid, [&](const std::string& task, const std::string& system) {
    StudyRow& row = rows.emplace_back();
    row.task = task;
    row.system = system;
    row.paper = paper_accuracy(task, system);
    const auto cells = grid_cells(grid, task, system);
    row.cells = std::ssize(cells);
    for (const StudyCell& cell : cells) {
      const auto found = results.find(cell.name());
      if (found == results.end()) continue;
      ++row.cells_done;
      row.diverged += found->second.diverged;
    }
    row.best_cell = best_cell(grid, results, task, system);
    if (!row.best_cell) return;
    row.best = results.at(row.best_cell->name()).best;
    const auto seeds = seed_cells(grid, *row.best_cell);
    if (!all_finished(results, seeds)) return;
    std::vector<double> of_seeds;
    std::map<int64_t, std::vector<double>> of_lengths;
    for (const StudyCell& cell : seeds) {
      const CellResult& result = results.at(cell.name());
      of_seeds.push_back(result.best);
      if (result.lengths.empty()) continue;
      of_lengths[grid.val_length].push_back(result.last);
      for (const LengthResult& l : result.lengths) of_lengths[l.length].push_back(l.accuracy);
    }
    row.median = median(of_seeds);
    for (const auto& [length, values] : of_lengths) {
      row.by_length.push_back(
          {.length = length, .models = std::ssize(values), .accuracy = median(values)});
    }
  });
  return rows;
}

}  // namespace mamba3
