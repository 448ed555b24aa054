// What a Bernoulli head does to the rows of its products h weight^T: log p(x; products + bias), and the gradient of the
// products.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct LinearBernoulliLogProb {
  Dtype dtype;                  // a compute type
  Dtype x_dtype;                // uint8 or `dtype`
  const void *products, *bias;  // [count, D] and [D]
  const void* x;
  void* log_prob;  // [count]
  RowMap<1> rows;  // operand: x; the rows of the whole batch
  int64_t first;   // the first row of the chunk, within the batch
  int64_t count, D;
  int64_t products_stride;  // between rows
};

// Writes the gradient of the products and its sums over rows, which add up to the gradient of the bias. The gradient is
// that of sum_n w_n log_prob_n with w_n = scale upstream_n. If `terms` is not null, the kernel also writes the terms of
// this sum, from the same exponentials.
struct LinearBernoulliGradient {
  Dtype dtype;                  // a compute type
  Dtype x_dtype;                // uint8 or `dtype`
  const void *products, *bias;  // [count, D] and [D]
  const void* x;
  const void* upstream;  // null if every element is 1
  double scale;
  void* terms;        // [count]: w_n log_prob_n, or null
  void* log_prob;     // [count]; null if not needed
  Dtype grad_dtype;   // `dtype` or a 16-bit type
  void* grad_logits;  // [count, D]; may alias the products
  void* sums;         // [pieces, D], one for every rows_of_sum() rows; null if not needed
  RowMap<2> rows;     // operands: x, upstream; the rows of the whole batch
  int64_t first;      // the first row of the chunk, within the batch
  int64_t count, D;
  int64_t products_stride, grad_stride;  // between rows
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(LinearBernoulliLogProb)
WAKESLEEP_KERNEL(LinearBernoulliGradient)
