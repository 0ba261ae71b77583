#pragma once

#include <initializer_list>
#include <string_view>

#include "core/context.h"
#include "core/view.h"

namespace mamba3 {

// The checks that an op makes of its arguments, once, before its kernels assume them. Every failure
// throws InputError with the op, the argument, what came and what was wanted:
//   [rms_norm] dim 0 of weight: got 7, want 768
class Check {
 public:
  Check(std::string_view op, const Context& context) : op_(op), device_(context.device) {}

  // The view is present, on the context's device, of one of the dtypes, and of these dims.
  // Its innermost stride is 1.
  void tensor(std::string_view name, const View& view, std::initializer_list<int64_t> dims,
              std::initializer_list<DType> dtypes = {DType::f32}) const;
  // As tensor(), and without gaps between rows.
  void dense(std::string_view name, const View& view, std::initializer_list<int64_t> dims,
             std::initializer_list<DType> dtypes = {DType::f32}) const;
  // What activations may be: f32, and on the GPU also bf16.
  std::initializer_list<DType> activation_types() const;
  // The two views do not share memory (identical views included).
  void disjoint(std::string_view name_a, const View& a, std::string_view name_b,
                const View& b) const;
  // The two views are one and the same, or do not share memory.
  void same_or_disjoint(std::string_view name_a, const View& a, std::string_view name_b,
                        const View& b) const;
  // `holds`, or InputError("[op] " + message).
  void that(bool holds, std::string_view message) const;
  // Every element of an i32 view lies in [low, high).
  void range(std::string_view name, const View& view, int64_t low, int64_t high) const;

 private:
  std::string_view op_;
  Device device_;
};

}  // namespace mamba3
