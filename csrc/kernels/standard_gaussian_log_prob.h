// log N(z; 0, I) = -1/2 sum_k [z^2 + log 2 pi] and its gradient, -z.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct StandardGaussianLogProb {
  Dtype dtype;  // of z
  const void* z;
  void* log_prob;  // [rows], in the compute type
  RowMap<1> rows;  // operand: z
  int64_t K;
};

struct StandardGaussianLogProbBackward {
  Dtype dtype;  // of z
  const void* z;
  const void* grad;  // in the compute type
  void* grad_z;      // [rows, K]
  RowMap<2> rows;    // operands: z, grad
  int64_t K;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(StandardGaussianLogProb)
WAKESLEEP_KERNEL(StandardGaussianLogProbBackward)
