#include "cuda/runtime.h"

#include <atomic>
#include <mutex>
#include <unordered_map>

#include "core/error.h"
#include "core/memory.h"
#include "cuda/timing.h"

namespace mamba3::cuda {

namespace {

constexpr int kOldest = 80;  // compute capability 8.0: bf16 matrix units

// Bytes that allocate_bytes() has given out.
std::atomic<int64_t> bytes_in_use = 0, most_bytes_in_use = 0;

void count_bytes(int64_t change) {
  const int64_t now = bytes_in_use += change;
  int64_t most = most_bytes_in_use;
  while (now > most && !most_bytes_in_use.compare_exchange_weak(most, now)) {
  }
}

std::string gigabytes(size_t bytes) {
  return fmt::format("{:.2f} GB", static_cast<double>(bytes) * 1e-9);
}

// The first GPU, or why there is none that we can use.
void check_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (driver == 0) input_error("there is no NVIDIA driver: install it, or use --device cpu");
    input_error(
        "the NVIDIA driver is for CUDA {}.{}, but this program needs {}.{}: update the driver, or "
        "use --device cpu",
        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  }
  if (status != cudaSuccess || count == 0) {
    input_error("there is no NVIDIA GPU that can be used ({}): use --device cpu",
                status == cudaSuccess ? "none found" : cudaGetErrorString(status));
  }
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "asking for the GPU's properties");
  if (device.major * 10 + device.minor < kOldest) {
    input_error("{} has compute capability {}.{}, but 8.0 or later is needed: use --device cpu",
                device.name, device.major, device.minor);
  }
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
    cudaDeviceProp device{};
    cudaGetDeviceProperties(&device, 0);
    error(
        "this program has no code for {} (compute capability {}.{}): build it with "
        "`make build CUDA_ARCHITECTURES=native` on a machine with such a card, or use --device cpu",
        device.name, device.major, device.minor);
  }
  error("[{}] CUDA: {} ({})", what, cudaGetErrorString(status), cudaGetErrorName(status));
}

void unsupported(const char* what, DType dtype) {
  error("{} cannot be {}", what, name_of(dtype));
}

Stream::~Stream() {
  if (stream != nullptr) cudaStreamDestroy(stream);
}

std::shared_ptr<Stream> make_stream() {
  check_device();
  auto made = std::make_shared<Stream>();
  check(cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking), "making a stream");
  int value = 0;
  check(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), "asking the GPU");
  made->multiprocessors = value;
  check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
        "asking the GPU");
  made->shared_memory = static_cast<size_t>(value);
  return made;
}

std::shared_ptr<void> allocate_bytes(size_t bytes) {
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes > 0 ? bytes : 1);
  if (status == cudaErrorMemoryAllocation) {
    size_t free = 0, total = 0;
    cudaGetLastError();  // not sticky; clear it
    cudaMemGetInfo(&free, &total);
    error("the GPU is out of memory: {} more are needed, {} of its {} are free", gigabytes(bytes),
          gigabytes(free), gigabytes(total));
  }
  check(status, "allocating memory");
  const auto counted = static_cast<int64_t>(bytes);
  count_bytes(counted);
  return {memory, [counted](void* owned) {
            cudaFree(owned);
            count_bytes(-counted);
          }};
}

int64_t peak_bytes() {
  return most_bytes_in_use;
}

void reset_peak_bytes() {
  most_bytes_in_use = bytes_in_use.load();
}

void copy_bytes(Context& ctx, const void* from, void* to, size_t bytes, bool wait) {
  record_begin(ctx, "copy");
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(ctx)), "copying");
  record_end(ctx);
  if (wait) cuda::synchronize(ctx);
}

void zero_bytes(Context& ctx, void* memory, size_t bytes) {
  record_begin(ctx, "zero");
  check(cudaMemsetAsync(memory, 0, bytes, stream_of(ctx)), "clearing memory");
  record_end(ctx);
}

void zero_new_bytes(void* memory, size_t bytes) {
  // Streams of ours do not wait for the default one, so this does.
  check(cudaMemset(memory, 0, bytes), "clearing memory");
  check(cudaStreamSynchronize(nullptr), "clearing memory");
}

void allow_shared_memory(const void* kernel, size_t bytes, const char* op) {
  if (bytes == 0) return;
  static std::mutex mutex;
  static std::unordered_map<const void*, size_t> allowed;
  const std::scoped_lock lock(mutex);
  size_t& most = allowed[kernel];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        op);
  most = bytes;
}

void synchronize(Context& ctx) {
  check(cudaStreamSynchronize(stream_of(ctx)), "waiting for the GPU");
  if (ctx.stream->recorder != nullptr) ctx.stream->recorder->synchronized();
}

bool available() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  cudaGetLastError();
  return found;
}

}  // namespace mamba3::cuda
