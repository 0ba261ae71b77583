#include "cpu/gemm.h"

#include <dnnl.h>

#include <algorithm>

#include "core/error.h"

// oneDNN splits a product among OpenMP threads, but our own pool has the threads. Declared here
// because the compiler need not be run with OpenMP switched on; libgomp is what oneDNN links.
extern "C" void omp_set_num_threads(int threads);
extern "C" int omp_get_max_threads();

namespace mamba3::cpu {

namespace {

// OpenMP regions that the calling thread starts have one thread; its setting is restored after.
class SerialOpenMp {
 public:
  SerialOpenMp() : threads_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~SerialOpenMp() { omp_set_num_threads(threads_); }
  SerialOpenMp(const SerialOpenMp&) = delete;
  SerialOpenMp& operator=(const SerialOpenMp&) = delete;

 private:
  int threads_;
};

// C = beta C, where beta = 0 overwrites even NaN.
void scale(const Gemm& g) {
  if (g.beta == 1.0f) return;
  for (int64_t m = 0; m < g.M; ++m) {
    float* row = g.c + m * g.ldc;
    if (g.beta == 0.0f) {
      std::fill(row, row + g.N, 0.0f);
    } else {
      for (int64_t n = 0; n < g.N; ++n) row[n] *= g.beta;
    }
  }
}

struct Tile {
  int64_t M, N;
};

// The tile of C that is one thread's piece of work. It depends on the shape only, so the sums do
// not depend on the number of threads. Sides of 256 keep a product of any K near the full rate;
// smaller ones only while there are too few tiles to share evenly and each is worth handing out.
// oneDNN loses a quarter of its rate below 128 columns, and little above 32 rows.
Tile tile_of(const Gemm& g) {
  constexpr int64_t kSide = 256, kFewestRows = 32, kFewestColumns = 128, kTiles = 32;
  constexpr int64_t kWork = 1 << 20;  // multiply-adds
  const auto pieces = [](int64_t n, int64_t side) { return (n + side - 1) / side; };
  const auto half = [&](int64_t side) { return pieces(side, 32) * 16; };
  Tile tile{std::min(g.M, kSide), std::min(g.N, kSide)};
  while (pieces(g.M, tile.M) * pieces(g.N, tile.N) < kTiles && tile.M * tile.N * g.K >= 2 * kWork) {
    if (tile.N >= std::max(tile.M, 2 * kFewestColumns)) {
      tile.N = half(tile.N);
    } else if (tile.M >= 2 * kFewestRows) {
      tile.M = half(tile.M);
    } else {
      break;
    }
  }
  return tile;
}

// The rows [m, m + tile.M) and columns [n, n + tile.N) of the product, cut off at its edge.
Gemm tile_at(const Gemm& g, int64_t m, int64_t n, const Tile& tile) {
  Gemm part = g;
  part.M = std::min(tile.M, g.M - m);
  part.N = std::min(tile.N, g.N - n);
  part.a += g.transpose_a ? m : m * g.lda;
  part.b += g.transpose_b ? n * g.ldb : n;
  part.c += m * g.ldc + n;
  return part;
}

}  // namespace

void gemm_serial(const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
  if (g.K == 0) return scale(g);  // oneDNN leaves C as it is
  const SerialOpenMp serial;
  const dnnl_status_t status =
      dnnl_sgemm(g.transpose_a ? 'T' : 'N', g.transpose_b ? 'T' : 'N', g.M, g.N, g.K, 1.0f, g.a,
                 g.lda, g.b, g.ldb, g.beta, g.c, g.ldc);
  if (status != dnnl_success) {
    error("[gemm] oneDNN failed with status {} on a product of M {}, N {}, K {}",
          static_cast<int>(status), g.M, g.N, g.K);
  }
}

void gemm(Context& ctx, const Gemm& g) {
  if (g.M == 0 || g.N == 0) return;
  const Tile tile = tile_of(g);
  const int64_t down = (g.M + tile.M - 1) / tile.M, across = (g.N + tile.N - 1) / tile.N;
  // Neighbours in time share a panel of the larger operand, which then streams from memory once.
  const bool down_first = g.M <= g.N;
  ctx.threads.parallel_for(down * across, 1, [&](int64_t begin, int64_t, int) {
    const int64_t m = down_first ? begin % down : begin / across;
    const int64_t n = down_first ? begin / down : begin % across;
    gemm_serial(tile_at(g, m * tile.M, n * tile.N, tile));
  });
}

}  // namespace mamba3::cpu
