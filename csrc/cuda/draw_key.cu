// Draws a key from the CUDA generator through its graph-safe state. So a draw that a CUDA graph captures gives fresh
// noise at each replay.
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/cuda/PhiloxUtils.cuh>

#include <mutex>

#include "../aten.h"
#include "../registration.h"
#include "launch.cuh"

namespace wakesleep::cuda {
namespace {

// Each key advances the generator's offset by this amount, regardless of the size of the draw. The generator requires a
// multiple of 4.
constexpr uint64_t kOffsetPerKey = 4;

__global__ void write_key(at::PhiloxCudaState state, int64_t* key) {
  const auto [seed, offset] = at::cuda::philox::unpack(state);
  key[0] = static_cast<int64_t>(seed);
  key[1] = static_cast<int64_t>(offset);
}

at::Tensor draw_key(const at::Tensor& like, std::optional<at::Generator> generator) {
  const c10::cuda::CUDAGuard guard(like.device());
  auto* source =
      at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator());
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(source->mutex_);
    state = source->philox_cuda_state(kOffsetPerKey);
  }
  at::Tensor key = aten::empty({2}, like.options().dtype(at::kLong));
  launch(write_key, 1, 1, state, key.mutable_data_ptr<int64_t>());
  return key;
}

}  // namespace

WAKESLEEP_KERNELS(CUDA, m) { m.impl("draw_key", draw_key); }

}  // namespace wakesleep::cuda
