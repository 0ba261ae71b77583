#pragma once

#include "support/device.h"
#include "train/study.h"

namespace mamba3::testing {

// Parity by a Mamba-3 of a few hundred parameters, for a few updates: seconds even where nothing is
// optimised.
inline StudyGrid tiny_study() {
  StudyGrid grid = full_study();
  grid.tasks = {"parity"};
  grid.systems = {"mamba3"};
  grid.d_model = {16};
  grid.lr = {1e-3, 2e-3};
  grid.d_state = 8;
  grid.headdim = 8;
  grid.batch = 4;
  grid.steps = 6;
  grid.max_length = 8;
  grid.val_length = 8;
  grid.val_rows = 32;
  grid.val_every = 2;
  return grid;
}

inline CellResult make_result(double best, double last, int64_t updates) {
  CellResult result;
  result.best = best;
  result.last = last;
  result.updates = updates;
  result.seconds = 1.5;
  result.device = "cpu";
  result.dtype = "f32";
  return result;
}

}  // namespace mamba3::testing
