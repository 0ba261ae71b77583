#pragma once

#include <cstdint>

namespace mamba3::cpu {

// A row-major matrix in scratch memory. Its rows start on whole register tiles of the widest
// instruction set, so that products may read and write whole tiles; the columns past the end are
// kept zero.
struct Matrix {
  float* data = nullptr;
  int64_t stride = 0;

  float* row(int64_t i) const { return data + i * stride; }
};

inline int64_t small_matrix_stride(int64_t columns) {
  return (columns + 31) / 32 * 32;
}

// Lays out matrices one after the other from `base`; with a null base it only counts.
class SmallMatrices {
 public:
  explicit SmallMatrices(float* base) : base_(base) {}
  Matrix take(int64_t rows, int64_t columns) {
    const Matrix matrix{base_ ? base_ + floats_ : nullptr, small_matrix_stride(columns)};
    floats_ += rows * matrix.stride;
    return matrix;
  }
  int64_t floats() const { return floats_; }

 private:
  float* base_;
  int64_t floats_ = 0;
};

}  // namespace mamba3::cpu
