#include "core/graph.h"

#include <exception>

#include "core/error.h"
#include "cuda/runtime.h"

namespace mamba3::cuda {

struct Recording {
  std::shared_ptr<Stream> stream;  // outlives what may still run on it
  cudaGraphExec_t graph = nullptr;

  Recording() = default;
  ~Recording() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);  // a replay under way is finished first
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
};

namespace {

struct DestroyGraph {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
};
using OwnedGraph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, DestroyGraph>;

// Recording ends however `ops` does: a stream that records runs nothing. Null if it was
// invalidated, by `ops`, which then left in `failure` what it threw, or by a call of another thread
// (CUDA loads the code of kernels when they are first used).
OwnedGraph capture(cudaStream_t stream, const std::function<void()>& ops,
                   std::exception_ptr& failure) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a graph");
  failure = nullptr;
  try {
    ops();
  } catch (...) {
    failure = std::current_exception();
  }
  cudaGraph_t graph = nullptr;
  const cudaError_t status = cudaStreamEndCapture(stream, &graph);
  OwnedGraph recorded(graph);
  cudaGetLastError();
  if (status == cudaErrorStreamCaptureInvalidated) return nullptr;
  if (failure != nullptr) std::rethrow_exception(failure);
  check(status, "recording a graph");
  return recorded;
}

}  // namespace

std::shared_ptr<Recording> record(Context& ctx, const std::function<void()>& ops) {
  constexpr int kAttempts = 8;
  OwnedGraph graph;
  std::exception_ptr failure;
  for (int attempt = 0; attempt < kAttempts && graph == nullptr; ++attempt) {
    graph = capture(stream_of(ctx), ops, failure);
  }
  if (graph == nullptr) {
    if (failure != nullptr) std::rethrow_exception(failure);
    check(cudaErrorStreamCaptureInvalidated, "recording a graph");
  }
  auto recording = std::make_shared<Recording>();
  recording->stream = ctx.stream;
  check(cudaGraphInstantiate(&recording->graph, graph.get(), 0), "making a graph");
  return recording;
}

void replay(Context& ctx, const Recording& recording) {
  check(cudaGraphLaunch(recording.graph, stream_of(ctx)), "replaying a graph");
}

}  // namespace mamba3::cuda
