#pragma once

// src/cuda/launch.cuh for the emulator.

#include <tuple>
#include <utility>

#include "cuda/grid.h"
#include "cuda/runtime.h"

namespace mamba3::cuda {

template <typename... Params, typename... Args>
void launch(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
            Args&&... args) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  record_begin(ctx, op);
  emulation::submit(
      stream_of(ctx),
      [kernel, grid,
       given = std::tuple<std::remove_cvref_t<Params>...>(static_cast<Params>(args)...)] {
        emulation::run(grid.blocks, grid.threads, grid.shared_bytes,
                       [&] { std::apply([&](const auto&... each) { kernel(each...); }, given); });
      });
  record_end(ctx);
}

inline bool can_overlap() {
  return false;
}

template <typename... Params, typename... Args>
void launch_overlapping(Context& ctx, const char* op, void (*kernel)(Params...), const Grid& grid,
                        unsigned, Args&&... args) {
  launch(ctx, op, kernel, grid, std::forward<Args>(args)...);
}

}  // namespace mamba3::cuda
