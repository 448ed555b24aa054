// How a kernel is started: on the current stream, with the launch checked. No other file says so.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

namespace wakesleep::cuda {

constexpr int kBlockThreads = 256;

// Runs kernel(arguments...) on `blocks` blocks of `threads`. Kernels stride over their work by the grid, so that a grid
// at the hardware's limit is still right.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) {
  if (blocks == 0) {
    return;
  }
  const auto grid = static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
  kernel<<<grid, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace wakesleep::cuda
