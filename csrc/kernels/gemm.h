// The GEMMs y = a b of the CPU.
#pragma once

#include "activations.h"
#include "kernel.h"

namespace wakesleep {

struct Matrix {
  const void* data;
  int64_t row, column;  // strides
};

// A GEMM of a small batch, which reads the operands in place.
struct SkinnyGemm {
  Dtype dtype;  // a compute type
  Matrix a, b;  // [M, K] and [K, N]; b is row-major, or a is row-major and b column-major
  void* y;      // [M, N], contiguous
  int64_t M, K, N;
};

// A GEMM of any size in float32, which packs the operands. It writes y = a b, y = y + a b, or y = f(a b + bias).
struct PackedGemm {
  Matrix a, b;  // [M, K] and [K, N], with any strides
  float* y;     // [M, N], contiguous
  int64_t M, K, N;
  bool adds;              // to y
  const float* bias;      // [N]; null if there is none
  Activation activation;  // f
};

namespace cpu {
void compute(const SkinnyGemm& call, Stream);
void compute(const PackedGemm& call, Stream);
}  // namespace cpu

}  // namespace wakesleep
