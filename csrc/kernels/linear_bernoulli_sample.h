// x ~ Bernoulli(s(products + bias)) for the rows of a Bernoulli head's products h weight^T.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct LinearBernoulliSample {
  Dtype dtype;                  // of the parameters
  Dtype x_dtype;                // uint8 or `dtype`
  const void *products, *bias;  // [count, D] and [D], in the compute type
  const int64_t* key;           // [2]
  void* x;                      // [.., D], the rows of the whole batch
  int64_t first;                // the first row of the chunk, within the batch
  int64_t count, D;
  int64_t products_stride;  // between rows
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(LinearBernoulliSample)
