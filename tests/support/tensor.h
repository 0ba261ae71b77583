#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "core/view.h"
#include "support/random.h"

namespace mamba3::testing {

// A tensor for tests, on the device of the tests (device.h). On the GPU the elements are
// filled in host memory and move to the GPU with the first view(); from then on every set(), at()
// and values() copies. Its memory is aligned to 64 bytes, surrounded
// by canaries, and starts as NaN
// (-1 for integers), so that an element that an op fails to write, or adds to instead of writing,
// shows. The canaries, between rows too if they are apart, are checked when the tensor dies: a
// write outside of the elements is a failure of the test.
class Tensor {
 public:
  // `row_gap` elements lie unused behind every row of the innermost dim.
  explicit Tensor(std::initializer_list<int64_t> dims, DType dtype = DType::f32,
                  int64_t row_gap = 0);
  Tensor(Tensor&&) = default;
  ~Tensor();

  static Tensor zeros(std::initializer_list<int64_t> dims, DType dtype = DType::f32,
                      int64_t row_gap = 0);
  // Normal with mean 0 and the deviation given, rounded to dtype.
  static Tensor normal(Random& random, std::initializer_list<int64_t> dims, double deviation = 1,
                       DType dtype = DType::f32, int64_t row_gap = 0);
  // Integers in [low, high).
  static Tensor integers(Random& random, std::initializer_list<int64_t> dims, int64_t low,
                         int64_t high);
  static Tensor of(std::initializer_list<int64_t> dims, std::span<const double> values,
                   DType dtype = DType::f32, int64_t row_gap = 0);
  static Tensor of_ids(std::initializer_list<int32_t> ids);  // (n) i32

  Tensor copy() const;

  // For ops, which may write to it.
  const View& view() const;
  operator const View&() const { return view(); }  // NOLINT: a tensor is passed where a view goes
  const View& host() const;  // the elements in host memory, for a test to read
  std::vector<double> values() const;

  // The element at a row-major position.
  void set(int64_t position, double value);
  double at(int64_t position) const;

  ::testing::AssertionResult canaries_alive() const;

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };
  Tensor(const View& like, int64_t row_gap);
  void upload() const;

  View host_, view_;
  int64_t row_gap_ = 0;
  size_t size_ = 0;  // bytes, canaries included
  std::unique_ptr<unsigned char[], Free> memory_;
  std::shared_ptr<void> gpu_memory_;  // as memory_; null on the CPU
  mutable bool uploaded_ = false;     // whether the GPU has the elements
};

// The element of a view of host memory at a row-major position.
void* element_of(const View& view, int64_t position);
double value_of(const View& view, int64_t position);
void set_value(const View& view, int64_t position, double value);
// All elements, row-major, of a view on any device.
std::vector<double> values_of(const View& view);

}  // namespace mamba3::testing
