#pragma once

// Matrix products by cuBLASLt. Its library has half a gigabyte, which a program that links it maps
// and relocates at every start; so it is loaded when the first product is asked for.

#include <cublasLt.h>

#include <array>
#include <map>
#include <memory>

#include "cuda/gemm.h"

namespace mamba3::cuda {

// The functions that we use.
struct CublasLt {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtGetStatusString) status_string;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulDescCreate) create_product;
  decltype(&cublasLtMatmulDescDestroy) destroy_product;
  decltype(&cublasLtMatmulDescSetAttribute) set_product;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference;
  decltype(&cublasLtMatrixLayoutCreate) create_layout;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout;
};

// Loaded on the first call. Throws Error if the library is not there.
const CublasLt& cublas_lt();

// What a stream keeps for its products: a handle, a workspace, and the algorithm of every kind of
// product seen so far, because asking for one takes longer than a small product.
class Cublas {
 public:
  Cublas();
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // False if cuBLASLt has no algorithm for this product, which is then not made. The first call of
  // a kind allocates host memory, but nothing waits for the device.
  bool gemm(Context& ctx, const char* op, const Gemm& gemm);

 private:
  struct Plan;
  using Kind = std::array<int64_t, 13>;
  static Kind kind_of(const Gemm& gemm);
  const Plan& plan_for(const char* op, const Gemm& gemm);

  std::shared_ptr<void> workspace_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Kind, std::unique_ptr<Plan>> plans_;
};

}  // namespace mamba3::cuda
