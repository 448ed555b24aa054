// x ~ Bernoulli(s(logits)): x = [u <= s(a)] for a uniform u in (0, 1].
#pragma once

#include "kernel.h"

namespace wakesleep {

struct BernoulliSample {
  Dtype dtype;    // of logits
  Dtype x_dtype;  // uint8 or the logits' dtype
  const void* logits;
  const int64_t* key;  // [2]
  void* x;             // [samples, rows, D]
  RowMap<1> rows;      // operand: logits; the rows of one sample
  int64_t samples, D;
};

}  // namespace wakesleep

WAKESLEEP_KERNEL(BernoulliSample)
