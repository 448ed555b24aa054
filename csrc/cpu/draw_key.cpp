// Draws a key from the CPU generator. The seed is one 64-bit number, drawn while the generator is locked.
#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

#include "../aten.h"
#include "../registration.h"

namespace wakesleep::cpu {
namespace {

at::Tensor draw_key(const at::Tensor& like, std::optional<at::Generator> generator) {
  auto* source = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  at::Tensor key = aten::empty({2}, at::TensorOptions().dtype(at::kLong));
  auto* words = key.mutable_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(source->mutex_);
  words[0] = static_cast<int64_t>(source->random64());
  words[1] = 0;
  return key;
}

}  // namespace

WAKESLEEP_KERNELS(CPU, m) { m.impl("draw_key", draw_key); }

}  // namespace wakesleep::cpu
