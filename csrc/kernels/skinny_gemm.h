// The GEMM y = a b of a small batch on the CPU.
#pragma once

#include "kernel.h"

namespace wakesleep {

struct SkinnyGemm {
  struct Matrix {
    const void* data;
    int64_t row, column;  // strides
  };
  Dtype dtype;  // a compute type
  Matrix a, b;  // [M, K] and [K, N]; b is row-major, or a is row-major and b column-major
  void* y;      // [M, N], contiguous
  int64_t M, K, N;
};

namespace cpu {
void compute(const SkinnyGemm& call, Stream);
}

}  // namespace wakesleep
