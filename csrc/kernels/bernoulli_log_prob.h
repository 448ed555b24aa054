// log p(x; logits) = sum_d [x a - softplus(a)] and its gradient with respect to the logits, x - s(a).
#pragma once

#include "kernel.h"

namespace wakesleep {

struct BernoulliLogProb {
  Dtype dtype;    // of logits
  Dtype x_dtype;  // uint8, or the logits' dtype or compute type
  const void *logits, *x;
  void* log_prob;  // [rows], in the compute type
  RowMap<2> rows;  // operands: logits, x
  int64_t D;
};

struct BernoulliLogProbBackward {
  Dtype dtype;    // of logits
  Dtype x_dtype;  // uint8, or the logits' dtype or compute type
  const void *logits, *x;
  const void* grad;          // in the compute type
  GradientRows grad_logits;  // [outer rows, D]
  RowGroups<3> rows;         // operands: logits, x, grad; outer rows: the rows of logits
  int64_t D;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(BernoulliLogProb)
WAKESLEEP_KERNEL(BernoulliLogProbBackward)
