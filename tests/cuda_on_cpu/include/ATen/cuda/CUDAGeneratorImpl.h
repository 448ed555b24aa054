#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/PhiloxCudaState.h>

namespace at {

// The CPU generator, with the one method of a CUDA generator that the kernels use.
struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(uint64_t increment) {
    TORCH_CHECK(increment % 4 == 0, "the offset of a CUDA generator grows by multiples of 4");
    return {random64(), 0};
  }
};

namespace cuda::detail {

inline const Generator& getDefaultCUDAGenerator() { return at::detail::getDefaultCPUGenerator(); }

}  // namespace cuda::detail
}  // namespace at
