// Which logits a Bernoulli head keeps for its backward pass: those that take at most kept_bytes(). Larger logits are
// recomputed. The caller can override this.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

namespace wakesleep {

constexpr int64_t kKeepNone = -1, kKeepAll = std::numeric_limits<int64_t>::max();

inline int64_t kept_bytes(at::Device device) { return (device.is_cuda() ? 16 : 4) * (int64_t(1) << 20); }

}  // namespace wakesleep
