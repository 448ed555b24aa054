// Launches kernels and checks for launch errors. No other file launches a kernel directly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../kernel.h"

namespace wakesleep::cuda {

constexpr int kBlockThreads = 256;

// Runs kernel(arguments...) on `blocks` blocks of `threads` threads. Kernels use grid-stride loops, so a grid that is
// clamped to the hardware limit still covers all the work.
template <typename... Parameters, typename... Arguments>
void launch(Stream stream, void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
  if (blocks == 0) {
    return;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = {static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()))};
  config.blockDim = {static_cast<unsigned>(threads)};
  config.stream = static_cast<cudaStream_t>(stream);
  check_launch(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace wakesleep::cuda
