#include "cuda/cublas.h"

#include <dlfcn.h>

#include <algorithm>

#include "core/error.h"
#include "core/memory.h"
#include "cuda/runtime.h"

namespace mamba3::cuda {

namespace {

constexpr size_t kWorkspace = size_t{32} << 20;  // what Hopper's algorithms want
// Prompts of every length are products of their own: beyond so many kinds all are forgotten.
constexpr size_t kMostPlans = 4096;

void* open_library() {
  const std::string name = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
  for (const std::string& path : {name, "/usr/local/cuda/lib64/" + name}) {
    if (void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  }
  const char* const reason = dlerror();
  error(
      "cannot load {} ({}). It is part of the CUDA {} toolkit, and of the folder that `make dist` "
      "makes: put it beside the program, or name its folder in LD_LIBRARY_PATH. Or use --device "
      "cpu, which does without",
      name, reason != nullptr ? reason : "no reason given", CUBLAS_VER_MAJOR);
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* const symbol = dlsym(library, name);
  if (symbol == nullptr) error("this libcublasLt has no {}: another version is needed", name);
  function = reinterpret_cast<Function>(symbol);
}

CublasLt load() {
  void* const library = open_library();
  CublasLt lt{};
  find(library, "cublasLtCreate", lt.create);
  find(library, "cublasLtDestroy", lt.destroy);
  find(library, "cublasLtGetStatusString", lt.status_string);
  find(library, "cublasLtMatmul", lt.matmul);
  find(library, "cublasLtMatmulAlgoGetHeuristic", lt.heuristic);
  find(library, "cublasLtMatmulDescCreate", lt.create_product);
  find(library, "cublasLtMatmulDescDestroy", lt.destroy_product);
  find(library, "cublasLtMatmulDescSetAttribute", lt.set_product);
  find(library, "cublasLtMatmulPreferenceCreate", lt.create_preference);
  find(library, "cublasLtMatmulPreferenceDestroy", lt.destroy_preference);
  find(library, "cublasLtMatmulPreferenceSetAttribute", lt.set_preference);
  find(library, "cublasLtMatrixLayoutCreate", lt.create_layout);
  find(library, "cublasLtMatrixLayoutDestroy", lt.destroy_layout);
  return lt;
}

void checked(cublasStatus_t status, const char* op) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  error("[{}] cuBLAS: {}", op, cublas_lt().status_string(status));
}

cudaDataType_t type_of(DType dtype) {
  if (dtype == DType::f32) return CUDA_R_32F;
  if (dtype == DType::bf16) return CUDA_R_16BF;
  unsupported("a matrix of a product", dtype);
}

// Of an address, in bytes: what an algorithm may assume. More than 256 makes no difference.
uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Whether the program is ending. The library then clears up by itself before objects that are older
// than it, as a context with static storage may be, and must not be called any more.
bool ending = false;
struct SetEnding {
  ~SetEnding() { ending = true; }
};

}  // namespace

const CublasLt& cublas_lt() {
  static const CublasLt functions = load();
  static const SetEnding set_ending;  // made after the library, so destroyed before it
  return functions;
}

// cuBLASLt thinks in columns: our row-major matrix is the transpose of its. So it computes
// C^T = op(B)^T op(A)^T, and its A is our B.
struct Cublas::Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;  // ours
  cublasLtMatmulAlgo_t algorithm{};
  bool found = false;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (ending) return;
    const CublasLt& lt = cublas_lt();
    for (const auto layout : {a, b, c}) {
      if (layout != nullptr) lt.destroy_layout(layout);
    }
    if (product != nullptr) lt.destroy_product(product);
  }
};

Cublas::Cublas() : workspace_(allocate_bytes(kWorkspace)) {
  checked(cublas_lt().create(&handle_), "starting cuBLAS");
}

Cublas::~Cublas() {
  if (!ending) cublas_lt().destroy(handle_);
}

Cublas::Kind Cublas::kind_of(const Gemm& gemm) {
  return {gemm.transpose_a,
          gemm.transpose_b,
          gemm.M,
          gemm.N,
          gemm.K,
          static_cast<int64_t>(gemm.dtype),
          static_cast<int64_t>(gemm.dtype_c),
          gemm.lda,
          gemm.ldb,
          gemm.ldc,
          alignment_of(gemm.a),
          alignment_of(gemm.b),
          alignment_of(gemm.c)};
}

const Cublas::Plan& Cublas::plan_for(const char* op, const Gemm& gemm) {
  if (plans_.size() >= kMostPlans) plans_.clear();
  std::unique_ptr<Plan>& known = plans_[kind_of(gemm)];
  if (known != nullptr) return *known;
  const CublasLt& lt = cublas_lt();
  auto plan = std::make_unique<Plan>();
  checked(lt.create_product(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F), op);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, bool transpose) {
    const cublasOperation_t operation = transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
    checked(lt.set_product(plan->product, attribute, &operation, sizeof operation), op);
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, gemm.transpose_b);
  set(CUBLASLT_MATMUL_DESC_TRANSB, gemm.transpose_a);
  const auto layout = [&](cublasLtMatrixLayout_t& made, DType dtype, bool transposed, int64_t rows,
                          int64_t columns, int64_t stride) {
    if (transposed) std::swap(rows, columns);
    checked(lt.create_layout(&made, type_of(dtype), static_cast<uint64_t>(columns),
                             static_cast<uint64_t>(rows), stride),
            op);
  };
  layout(plan->a, gemm.dtype, gemm.transpose_a, gemm.M, gemm.K, gemm.lda);
  layout(plan->b, gemm.dtype, gemm.transpose_b, gemm.K, gemm.N, gemm.ldb);
  layout(plan->c, gemm.dtype_c, false, gemm.M, gemm.N, gemm.ldc);

  cublasLtMatmulPreference_t made = nullptr;
  checked(lt.create_preference(&made), op);
  const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>,
                        decltype(lt.destroy_preference)>
      preference(made, lt.destroy_preference);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    checked(lt.set_preference(preference.get(), attribute, &value, sizeof value), op);
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  // Where K is split, the parts are added in f32 and in a fixed order by a step of its own.
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
         static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(gemm.b));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(gemm.a));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(gemm.c));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(gemm.c));

  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = lt.heuristic(handle_, plan->product, plan->b, plan->a, plan->c,
                                             plan->c, preference.get(), 1, &result, &found);
  // Both are said of combinations that it does not know.
  if (status != CUBLAS_STATUS_NOT_SUPPORTED && status != CUBLAS_STATUS_INVALID_VALUE) {
    checked(status, op);
    plan->found = found > 0 && result.state == CUBLAS_STATUS_SUCCESS;
    plan->algorithm = result.algo;
  }
  known = std::move(plan);
  return *known;
}

bool Cublas::gemm(Context& ctx, const char* op, const Gemm& gemm) {
  const Plan& plan = plan_for(op, gemm);
  if (!plan.found) return false;
  const float alpha = 1;
  record_begin(ctx, op);
  checked(cublas_lt().matmul(handle_, plan.product, &alpha, gemm.b, plan.b, gemm.a, plan.a,
                             &gemm.beta, gemm.c, plan.c, gemm.c, plan.c, &plan.algorithm,
                             workspace_.get(), kWorkspace, stream_of(ctx)),
          op);
  record_end(ctx);
  return true;
}

}  // namespace mamba3::cuda
