// Declares the torch functions that kernels call. torch's own header for any of these functions includes
// ATen/Context.h, which takes 5 s to compile. Methods of at::Tensor need no declaration here, because
// ATen/core/Tensor.h declares them.
#pragma once

#include <ATen/core/Tensor.h>

namespace wakesleep::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// Multiplies matrices of a 16-bit floating dtype and accumulates in float32. The result has dtype `type`, which must be
// float32.
at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

// Writes the sum of `rows` over its first dimension to `sums`.
at::Tensor& sum_rows(const at::Tensor& rows, at::Tensor& sums);

}  // namespace wakesleep::aten
