// Computes GEMMs on the CPU, and chooses the implementation of each.
#pragma once

#include "../linear.h"

namespace wakesleep::cpu {

// The base class of the CPU kernels. Our own GEMM computes small batches. The BLAS or oneDNN, whichever is faster,
// computes large batches.
struct Products {
  static constexpr bool kOwnSmallBatches = false;

  // Returns the matrix product a b in dtype `type`. The operands are float32 or float64.
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

  // Adds the matrix product a b to `sum` in place.
  static void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);
};

}  // namespace wakesleep::cpu
