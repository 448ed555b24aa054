// Sums the rows of a matrix. The rows are partial sums, which other kernels write.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct ColumnSums {
  Dtype dtype;       // float32 or float64
  const void* rows;  // [count, D]
  void* sums;        // [D]
  int64_t count, D;
  bool adds;  // adds to `sums` instead of overwriting it
};

namespace cuda {
void compute(const ColumnSums& call, Stream);
}

}  // namespace wakesleep
