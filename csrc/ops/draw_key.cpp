// Draws a key from a generator, which is locked meanwhile. On the CPU, the seed of the key is one 64-bit number. On
// CUDA, the key is the generator's graph-safe state, so a draw that a CUDA graph captures gives fresh noise at each
// replay.
#include <ATen/CPUGeneratorImpl.h>

#ifdef WAKESLEEP_CUDA_VERSION
#include <ATen/cuda/CUDAGeneratorImpl.h>
#endif

#include <mutex>

#include "geometry.h"
#include "register.h"

namespace wakesleep {
namespace {

WriteKey cpu_key(const std::optional<at::Generator>& generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  return {{static_cast<int64_t>(source->random64()), nullptr}, {0, nullptr}, 0, nullptr};
}

#ifdef WAKESLEEP_CUDA_VERSION
// Each key advances the generator's offset by this amount, regardless of the size of the draw. The generator requires a
// multiple of 4.
constexpr uint64_t kOffsetPerKey = 4;

at::PhiloxCudaState next_state(at::Device device, const std::optional<at::Generator>& generator) {
  const c10::DeviceGuard guard(device);  // the generator asks whether a graph captures the device's current stream
  auto* source =
      at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(source->mutex_);
  return source->philox_cuda_state(kOffsetPerKey);
}

WriteKey cuda_key(at::Device device, const std::optional<at::Generator>& generator) {
  const at::PhiloxCudaState state = next_state(device, generator);
  if (state.captured_) {
    return {{0, state.seed_.ptr}, {0, state.offset_.ptr}, static_cast<int64_t>(state.offset_intragraph_), nullptr};
  }
  return {
      {static_cast<int64_t>(state.seed_.val), nullptr}, {static_cast<int64_t>(state.offset_.val), nullptr}, 0, nullptr};
}
#endif

WriteKey next_key(at::Device device, const std::optional<at::Generator>& generator) {
#ifdef WAKESLEEP_CUDA_VERSION
  if (device.is_cuda()) {
    return cuda_key(device, generator);
  }
#endif
  return cpu_key(generator);
}

// Returns one key [2], or one for each member, [*members, 2], which equal those of as many calls.
at::Tensor draw_key(const at::Tensor& like, std::optional<at::Generator> generator, at::IntArrayRef members) {
  check_sizes("draw_key", "members", members);
  const at::Tensor keys = at::empty(concat(members, {2}), like.options().dtype(at::kLong));
  auto* const first = keys.mutable_data_ptr<int64_t>();
  for (auto* key = first; key != first + keys.numel(); key += 2) {
    WriteKey call = next_key(like.device(), generator);
    call.key = key;
    compute(keys.device(), call);
  }
  return keys;
}

}  // namespace

WAKESLEEP_OPS(m) { m.impl("draw_key", draw_key); }

}  // namespace wakesleep
