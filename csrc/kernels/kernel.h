// A kernel is a function compute(call, stream) of a backend. The call is a struct of pointers, sizes and row maps,
// which the host code has checked and allocated. A kernel checks nothing and allocates no tensor. This folder is plain
// C++ and CUDA, so that it compiles fast and alone.
#pragma once

#include "rows.h"

namespace wakesleep {

using Stream = void*;  // the cudaStream_t to launch on; null on the CPU

namespace cuda {
// Throws unless the error, a cudaError_t, is cudaSuccess. The host code defines this function.
void check_launch(int error);

// Returns whether a kernel may be launched before the previous one has completed. The host code defines this function.
bool launches_early();
}  // namespace cuda

}  // namespace wakesleep

// Declares the kernel of each backend for a type of call.
#define WAKESLEEP_KERNEL(Call)            \
  namespace wakesleep::cpu {              \
  void compute(const Call& call, Stream); \
  }                                       \
  namespace wakesleep::cuda {             \
  void compute(const Call& call, Stream); \
  }
