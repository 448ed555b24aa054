// Argument checks that the ops share. Each error message names the op, the argument, the expected value and the
// actual value. Checks never read tensor values, since that would synchronise with the GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "../backend.h"

namespace wakesleep {

// A tensor argument and its name in the public API.
struct Argument {
  const char* name;
  const at::Tensor& tensor;                    // [*B, D]
  std::optional<size_t> index = std::nullopt;  // position in the list, if the argument is a list
};

inline std::ostream& operator<<(std::ostream& stream, const Argument& argument) {
  stream << argument.name;
  return argument.index ? stream << '[' << *argument.index << ']' : stream;
}

inline void check_event(const char* op, const Argument& argument) {
  TORCH_CHECK_VALUE(argument.tensor.dim() >= 1, op, ": expected ", argument.name,
                    " to have at least one dimension, the event, got a 0-dimensional tensor");
}

inline void check_floating(const char* op, const Argument& argument) {
  const auto type = argument.tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
                   ": expected ", argument, " to be float64, float32, bfloat16 or float16, got ", type);
}

inline void check_same_device(const char* op, const Argument& first, const Argument& other) {
  TORCH_CHECK_VALUE(first.tensor.device() == other.tensor.device(), op, ": expected ", other, " on ",
                    first.tensor.device(), ", the device of ", first, ", got ", other.tensor.device());
}

inline void check_same_event(const char* op, const Argument& first, const Argument& other) {
  check_event(op, first);
  check_event(op, other);
  check_same_device(op, first, other);
  TORCH_CHECK_VALUE(first.tensor.size(-1) == other.tensor.size(-1), op, ": expected the last dimension of ", other.name,
                    " to be ", first.tensor.size(-1), ", that of ", first.name, ", got ", other.tensor.size(-1));
}

// The leading dimensions of an argument, or of several arguments that broadcast.
struct Batch {
  const char* name;
  at::IntArrayRef sizes;
};

inline Batch batch_of(const Argument& argument) {
  return {argument.name, argument.tensor.sizes().slice(0, argument.tensor.dim() - 1)};
}

// Returns the shape to which both batches broadcast.
inline at::DimVector broadcast_batch(const char* op, const Batch& first, const Batch& other) {
  const auto a = first.sizes, b = other.sizes;
  const size_t dims = std::max(a.size(), b.size());
  at::DimVector shape(dims);
  for (size_t i = 0; i < dims; ++i) {  // from the last dimension to the first
    const int64_t m = i < a.size() ? a[a.size() - 1 - i] : 1;
    const int64_t n = i < b.size() ? b[b.size() - 1 - i] : 1;
    TORCH_CHECK_VALUE(m == n || m == 1 || n == 1, op, ": expected the leading dimensions of ", first.name, " and ",
                      other.name, " to broadcast, got ", a, " and ", b);
    shape[dims - 1 - i] = m == 1 ? n : m;
  }
  return shape;
}

inline at::DimVector broadcast_batch(const char* op, const Argument& first, const Argument& other) {
  return broadcast_batch(op, batch_of(first), batch_of(other));
}

// Checks the gradient of a log-probability, which has one element per row of the batch. Returns the gradient in the
// compute type.
inline at::Tensor check_row_gradient(const char* op, const char* name, const at::Tensor& grad, at::IntArrayRef batch,
                                     const Argument& operand) {
  check_same_device(op, operand, {name, grad});
  TORCH_CHECK_VALUE(grad.sizes() == batch, op, ": expected ", name, " to have shape ", batch, ", got ", grad.sizes());
  return grad.to(compute_dtype(operand.tensor.scalar_type()));
}

// Checks a tensor of weights, which must broadcast to the batch shape.
inline void check_row_weights(const char* op, const Argument& argument, c10::SymIntArrayRef batch) {
  check_floating(op, argument);
  const auto sizes = argument.tensor.sym_sizes();
  bool broadcasts = sizes.size() <= batch.size();
  for (size_t i = 1; broadcasts && i <= sizes.size(); ++i) {  // from the last dimension to the first
    const c10::SymInt& size = sizes[sizes.size() - i];
    broadcasts = size == batch[batch.size() - i] || size == 1;
  }
  TORCH_CHECK_VALUE(broadcasts, op, ": expected ", argument.name, " to broadcast to ", batch, ", the rows, got ",
                    sizes);
}

inline void check_key_type(const char* op, const at::Tensor& key, const Argument& operand) {
  TORCH_CHECK_TYPE(key.scalar_type() == at::kLong, op, ": expected key to be int64, got ", key.scalar_type());
  check_same_device(op, operand, {"key", key});
}

inline void check_key(const char* op, const at::Tensor& key, const Argument& operand) {
  check_key_type(op, key, operand);
  TORCH_CHECK_VALUE(key.dim() == 1 && key.size(0) == 2, op, ": expected key to have shape [2], (seed, offset), got ",
                    key.sizes());
}

inline void check_sizes(const char* op, const char* name, at::IntArrayRef sizes) {
  for (const int64_t size : sizes) {
    TORCH_CHECK_VALUE(size >= 0, op, ": expected ", name, " to have no negative sizes, got ", sizes);
  }
}

}  // namespace wakesleep
