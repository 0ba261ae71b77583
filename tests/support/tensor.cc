#include "support/tensor.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "support/device.h"

namespace mamba3::testing {

namespace {

constexpr size_t kCanaryBytes = 64;
constexpr unsigned char kCanary = 0xff;  // NaN in every floating dtype, -1 as an integer

}  // namespace

void* element_of(const View& view, int64_t position) {
  int64_t offset = 0;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    offset += position % view.dim(axis) * view.stride(axis);
    position /= view.dim(axis);
  }
  return static_cast<char*>(view.data) + offset * size_of(view.dtype);
}

double value_of(const View& view, int64_t position) {
  const void* element = element_of(view, position);
  if (view.dtype == DType::i32) {
    int32_t value;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  if (view.dtype == DType::i64) {
    int64_t value;
    std::memcpy(&value, element, sizeof(value));
    return static_cast<double>(value);
  }
  if (view.dtype == DType::f64) {
    double value;
    std::memcpy(&value, element, sizeof(value));
    return value;
  }
  float value;
  to_float(element, view.dtype, &value, 1);
  return static_cast<double>(value);
}

void set_value(const View& view, int64_t position, double value) {
  void* element = element_of(view, position);
  if (view.dtype == DType::i32) {
    const auto integer = static_cast<int32_t>(value);
    std::memcpy(element, &integer, sizeof(integer));
    return;
  }
  if (view.dtype == DType::i64) {
    const auto integer = static_cast<int64_t>(value);
    std::memcpy(element, &integer, sizeof(integer));
    return;
  }
  if (view.dtype == DType::f64) {
    std::memcpy(element, &value, sizeof(value));
    return;
  }
  const auto single = static_cast<float>(value);
  from_float(&single, element, view.dtype, 1);
}

std::vector<double> values_of(const View& any) {
  const HostCopy copied = host_copy(any);
  const View& view = copied.view;
  std::vector<double> values(static_cast<size_t>(view.size()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = value_of(view, static_cast<int64_t>(i));
  return values;
}

void Tensor::Free::operator()(unsigned char* memory) const {
  std::free(memory);
}

Tensor::Tensor(const View& like, int64_t row_gap) : host_(like), row_gap_(row_gap) {
  int64_t stride = 1;
  for (int axis = host_.rank - 1; axis >= 0; --axis) {
    host_.strides[static_cast<size_t>(axis)] = stride;
    stride *= host_.dim(axis);
    if (axis == host_.rank - 1) stride += row_gap;
  }
  const size_t bytes = static_cast<size_t>(stride * size_of(host_.dtype));
  size_ = (bytes + kCanaryBytes - 1) / kCanaryBytes * kCanaryBytes + 2 * kCanaryBytes;
  memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(kCanaryBytes, size_)));
  std::memset(memory_.get(), kCanary, size_);
  host_.data = memory_.get() + kCanaryBytes;
  host_.device = Device::cpu;
  view_ = host_;
  if (test_device() == Device::cpu) return;
  gpu_memory_ = allocate_bytes(Device::cuda, size_);
  view_.data = static_cast<unsigned char*>(gpu_memory_.get()) + kCanaryBytes;
  view_.device = Device::cuda;
}

Tensor::Tensor(std::initializer_list<int64_t> dims, DType dtype, int64_t row_gap)
    : Tensor(make_view(nullptr, dtype, dims), row_gap) {}

Tensor::~Tensor() {
  if (!memory_) return;  // moved from
  EXPECT_TRUE(canaries_alive());
}

void Tensor::upload() const {
  Context ctx = make_context(1);
  const auto bytes = static_cast<int64_t>(size_);
  mamba3::copy(ctx, make_view(memory_.get(), DType::u8, {bytes}),
               make_view(gpu_memory_.get(), DType::u8, {bytes}, Device::cuda));
  uploaded_ = true;
}

const View& Tensor::view() const {
  if (gpu_memory_ && !uploaded_) upload();
  return view_;
}

const View& Tensor::host() const {
  if (uploaded_) {
    Context ctx = make_context(1);
    const auto bytes = static_cast<int64_t>(size_);
    mamba3::copy(ctx, make_view(gpu_memory_.get(), DType::u8, {bytes}, Device::cuda),
                 make_view(memory_.get(), DType::u8, {bytes}));
  }
  return host_;
}

Tensor Tensor::zeros(std::initializer_list<int64_t> dims, DType dtype, int64_t row_gap) {
  Tensor tensor(dims, dtype, row_gap);
  for (int64_t i = 0; i < tensor.host_.size(); ++i) tensor.set(i, 0);
  return tensor;
}

Tensor Tensor::normal(Random& random, std::initializer_list<int64_t> dims, double deviation,
                      DType dtype, int64_t row_gap) {
  Tensor tensor(dims, dtype, row_gap);
  for (int64_t i = 0; i < tensor.host_.size(); ++i) tensor.set(i, deviation * random.normal());
  return tensor;
}

Tensor Tensor::integers(Random& random, std::initializer_list<int64_t> dims, int64_t low,
                        int64_t high) {
  Tensor tensor(dims, DType::i32);
  for (int64_t i = 0; i < tensor.host_.size(); ++i) {
    tensor.set(i, static_cast<double>(random.integer(low, high)));
  }
  return tensor;
}

Tensor Tensor::of(std::initializer_list<int64_t> dims, std::span<const double> values, DType dtype,
                  int64_t row_gap) {
  Tensor tensor(dims, dtype, row_gap);
  assert(tensor.host_.size() == static_cast<int64_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) tensor.set(static_cast<int64_t>(i), values[i]);
  return tensor;
}

Tensor Tensor::of_ids(std::initializer_list<int32_t> ids) {
  const std::vector<double> values(ids.begin(), ids.end());
  return of({static_cast<int64_t>(ids.size())}, values, DType::i32);
}

Tensor Tensor::copy() const {
  Tensor tensor(host(), row_gap_);
  std::memcpy(tensor.memory_.get(), memory_.get(), size_);
  return tensor;
}

std::vector<double> Tensor::values() const {
  return values_of(host());
}

void Tensor::set(int64_t position, double value) {
  set_value(host(), position, value);
  if (uploaded_) upload();
}

double Tensor::at(int64_t position) const {
  return value_of(host(), position);
}

::testing::AssertionResult Tensor::canaries_alive() const {
  const View& view = host();
  std::vector<bool> element(size_, false);
  const auto bytes = static_cast<size_t>(size_of(view.dtype));
  for (int64_t i = 0; i < view.size(); ++i) {
    const auto offset =
        static_cast<size_t>(static_cast<const unsigned char*>(element_of(view, i)) - memory_.get());
    for (size_t byte = 0; byte < bytes; ++byte) element[offset + byte] = true;
  }
  for (size_t i = 0; i < size_; ++i) {
    if (element[i] || memory_[i] == kCanary) continue;
    return ::testing::AssertionFailure()
           << "a write outside of the tensor " << view.shape() << ", "
           << static_cast<int64_t>(i) - static_cast<int64_t>(kCanaryBytes)
           << " bytes from its first element";
  }
  return ::testing::AssertionSuccess();
}

}  // namespace mamba3::testing
