// Launches kernels and checks for launch errors. No other file launches a kernel directly.
//
// On compute capability 9.0 and later, a kernel is launched while the previous one still runs, and waits on the device.
// This hides most of the time between kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "../kernel.h"

namespace wakesleep::cuda {

constexpr int kBlockThreads = 256;

// Compiled for an earlier architecture, a kernel would not wait.
constexpr bool can_wait(std::initializer_list<int> architectures) {
  for (const int architecture : architectures) {
    if (architecture < 900) {
      return false;
    }
  }
  return true;
}
constexpr bool kCanWait = can_wait({__CUDA_ARCH_LIST__});

// Waits until the previous kernels of the stream have completed and their results are visible. Then lets the next
// kernel be launched. Every kernel calls this function before it reads or writes memory.
inline __device__ void wait_for_previous() {
  if constexpr (kCanWait) {
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
  }
}

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
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = kCanWait && launches_early() ? 1 : 0;
  check_launch(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace wakesleep::cuda
