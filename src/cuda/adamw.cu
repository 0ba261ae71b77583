// Schedule. Tensors are cut into pieces, a block each. Tables of up to kTensors tensors travel in
// the parameters of the kernels, so that nothing is uploaded. The squares of the gradient are
// summed within pieces, then one block sums the pieces in order; the update reads the norm from the
// device, and so it does with the loss and the step's numbers if they are there.

#include "cuda/pack.cuh"
#include "ops/adamw.h"

namespace mamba3::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 16384;  // elements
constexpr int kTensors = 64;       // a launch: the parameters of a kernel have 4 KB
constexpr int kPack = 4;

struct Tensor {
  float* param;
  const float* grad;
  float *m, *v;
  __nv_bfloat16* low;  // or null
  int64_t size;
  int first_piece;  // among those of the launch
  bool decay, packed;
};

struct Table {
  Tensor tensors[kTensors];
  int count;
};

// The numbers of one update, the same for every element.
struct Update {
  float beta1, beta2, eps;
  float clip;  // 0: no clipping
  AdamwNumbers now;
  const float* numbers;  // in the place of `now`; or null
  const double* loss;    // or null
};

// The tensor and the elements of it that belong to this block.
struct Piece {
  const Tensor& tensor;
  int64_t begin, end;
};

__device__ Piece piece_of_block(const Table& table) {
  const int piece = static_cast<int>(blockIdx.x);
  int low = 0, high = table.count;  // the tensor is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.tensors[middle].first_piece <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Tensor& tensor = table.tensors[low];
  const int64_t begin = (piece - tensor.first_piece) * kPiece;
  return {tensor, begin, min(begin + kPiece, tensor.size)};
}

// Calls body.template operator()<n>(i) for the elements i ... i + n - 1 of the piece.
template <typename Body>
__device__ void for_each_pack(const Piece& piece, Body&& body) {
  const int64_t size = piece.end - piece.begin;
  const int64_t packed = piece.tensor.packed ? size / kPack * kPack : 0;
  for (int64_t i = threadIdx.x * kPack; i < packed; i += kThreads * kPack)
    body.template operator()<kPack>(piece.begin + i);
  for (int64_t i = packed + threadIdx.x; i < size; i += kThreads)
    body.template operator()<1>(piece.begin + i);
}

// partial[piece] = the sum of the squares of its gradient.
__global__ void __launch_bounds__(kThreads)
    sum_squares(const __grid_constant__ Table table, float* partial) {
  __shared__ float scratch[kThreads / kWarp];
  const Piece piece = piece_of_block(table);
  float sum = 0;
  for_each_pack(piece, [&]<int n>(int64_t i) {
    float g[n];
    load(piece.tensor.grad + i, g);
#pragma unroll
    for (int j = 0; j < n; ++j) sum += g[j] * g[j];
  });
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// norm = the root of the sum of partial; one block.
__global__ void __launch_bounds__(kThreads)
    finish_norm(const float* partial, int64_t pieces, float* norm) {
  __shared__ double sums[kThreads];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) sum += static_cast<double>(partial[i]);
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sums[0]));
}

__global__ void __launch_bounds__(kThreads)
    update_pieces(const __grid_constant__ Table table, Update u, const float* grad_norm) {
  const float norm = *grad_norm;
  if (!isfinite(norm) || (u.loss != nullptr && !isfinite(*u.loss))) return;
  if (u.numbers != nullptr) u.now = {u.numbers[0], u.numbers[1], u.numbers[2], u.numbers[3]};
  const Piece piece = piece_of_block(table);
  const Tensor& t = piece.tensor;
  const float clip = u.clip > 0 && norm > u.clip ? u.clip / norm : 1.0f;
  const float decay = t.decay ? u.now.decay : 0.0f, rate = u.now.lr * u.now.unbias1;
  for_each_pack(piece, [&]<int n>(int64_t i) {
    float param[n], grad[n], m[n], v[n];
    load(t.param + i, param);
    load(t.grad + i, grad);
    load(t.m + i, m);
    load(t.v + i, v);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float g = grad[j] * clip;
      m[j] = u.beta1 * m[j] + (1 - u.beta1) * g;
      v[j] = u.beta2 * v[j] + (1 - u.beta2) * (g * g);
      const float step = rate * m[j] / (sqrtf(v[j] * u.now.unbias2) + u.eps);
      param[j] -= decay * param[j] + step;
    }
    store(param, t.param + i);
    store(m, t.m + i);
    store(v, t.v + i);
    if (t.low != nullptr) store(param, t.low + i);
  });
}

// Calls use(table, its pieces) for tables that hold all the tensors.
template <typename Use>
void for_each_table(std::span<const AdamwTensor> tensors, const Use& use) {
  for (size_t begin = 0; begin < tensors.size(); begin += kTensors) {
    Table table{};
    int pieces = 0;
    for (const AdamwTensor& t :
         tensors.subspan(begin, std::min<size_t>(kTensors, tensors.size() - begin))) {
      const int64_t size = t.param.size();
      if (size == 0) continue;
      const auto aligned = [](const View& view) {
        return reinterpret_cast<uintptr_t>(view.data) % (kPack * size_of(view.dtype)) == 0;
      };
      table.tensors[table.count++] = {.param = data<float>(t.param),
                                      .grad = data<float>(t.grad),
                                      .m = data<float>(t.m),
                                      .v = data<float>(t.v),
                                      .low = data<__nv_bfloat16>(t.low),
                                      .size = size,
                                      .first_piece = pieces,
                                      .decay = t.decay,
                                      .packed = aligned(t.param) && aligned(t.grad) &&
                                                aligned(t.m) && aligned(t.v) &&
                                                (t.low.empty() || aligned(t.low))};
      pieces += static_cast<int>((size + kPiece - 1) / kPiece);
    }
    use(table, pieces);
  }
}

Update update_of(const AdamwArgs& args) {
  return {.beta1 = args.beta1,
          .beta2 = args.beta2,
          .eps = args.eps,
          .clip = args.clip,
          .now = adamw_numbers(args),
          .numbers = data<float>(args.numbers),
          .loss = data<double>(args.loss)};
}

}  // namespace

void adamw(Context& ctx, const AdamwArgs& args) {
  int64_t pieces = 0;
  for_each_table(args.tensors, [&](const Table&, int count) { pieces += count; });
  ScratchScope scope(ctx.scratch);
  float* const partial = scope.take<float>(pieces).data();
  int64_t done = 0;
  for_each_table(args.tensors, [&](const Table& table, int count) {
    launch(ctx, "adamw", sum_squares,
           {.blocks = {static_cast<unsigned>(count)}, .threads = {kThreads}}, table,
           partial + done);
    done += count;
  });
  float* const norm = data<float>(args.grad_norm);
  launch(ctx, "adamw", finish_norm, {.blocks = {1}, .threads = {kThreads}}, partial, pieces, norm);
  const Update update = update_of(args);
  for_each_table(args.tensors, [&](const Table& table, int count) {
    launch(ctx, "adamw", update_pieces,
           {.blocks = {static_cast<unsigned>(count)}, .threads = {kThreads}}, table, update, norm);
  });
}

}  // namespace mamba3::cuda
