// Recognises an upstream gradient of 1 without reading it, which would wait for a GPU. A caller marks a tensor of ones
// and starts the backward pass from it.
#pragma once

#include <ATen/core/Tensor.h>

namespace wakesleep::autograd {

// Marks a tensor whose elements are 1.
void mark_unit_gradient(const at::Tensor& ones);

// Returns true if the tensor is a marked one or a view of it, and torch has not modified it since.
bool is_unit_gradient(const at::Tensor& tensor);

}  // namespace wakesleep::autograd
