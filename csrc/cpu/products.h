// Products of matrices on the CPU, and who makes them.
#pragma once

#include "../linear.h"

namespace wakesleep::cpu {

// What kernels inherit. Our own kernels multiply small batches; of the platform's two libraries the faster one
// does where they are many.
struct Products {
  static constexpr bool kOwnSmallBatches = false;

  // a b, of type `type`; a and b float32 or float64.
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

  // sum += a b.
  static void add_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);
};

}  // namespace wakesleep::cpu
