// What a layer y = f(h weight^T + bias) does to the rows of its products h weight^T, forward and backward.
#pragma once

#include "activations.h"
#include "kernel.h"

namespace wakesleep {

// Writes y = f(product + bias).
struct MlpOutput {
  Dtype dtype;  // of the output
  Activation activation;
  const void *products, *bias;  // [rows, D] and [D], in the compute type
  void* output;                 // [rows, D]; may alias the products
  int64_t rows, D;
  int64_t products_stride, output_stride;  // between rows
};

// Writes the gradient of the products and its sums over rows, which add up to the gradient of the bias.
struct MlpGradient {
  Dtype dtype;  // of grad and output
  Activation activation;
  const void *grad, *output;  // [rows, D], the gradient of y, and y
  Dtype written_dtype;        // `dtype` or its compute type
  void* written;              // [rows, D]; may alias grad; null if only the sums are needed
  void* sums;                 // [pieces, D], in the compute type, one for every rows_of_sum() rows; null if not needed
  int64_t rows, D;
  int64_t written_stride;  // between rows
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(MlpOutput)
WAKESLEEP_KERNEL(MlpGradient)
