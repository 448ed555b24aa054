// Launches kernels on the current stream and checks for launch errors. No other file launches a kernel directly.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

namespace wakesleep::cuda {

constexpr int kBlockThreads = 256;

inline void check_launch(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice) {
    (void)cudaGetLastError();
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "wakesleep_ext: none of the compiled kernels runs on this GPU; `wakesleep info` ",
                                "says which GPUs they were compiled for and how to reinstall them");
  }
  C10_CUDA_CHECK(error);
}

// Runs kernel(arguments...) on `blocks` blocks of `threads` threads. Kernels use grid-stride loops, so a grid that is
// clamped to the hardware limit still covers all the work.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
  if (blocks == 0) {
    return;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = {static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()))};
  config.blockDim = {static_cast<unsigned>(threads)};
  config.stream = c10::cuda::getCurrentCUDAStream();
  check_launch(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace wakesleep::cuda
