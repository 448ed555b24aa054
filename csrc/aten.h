// Declares the torch functions that kernels call. torch's own header for any of them includes ATen/Context.h, which
// takes 5 s to compile. Methods of at::Tensor add nothing: they come with ATen/core/Tensor.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace wakesleep::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// Multiplies matrices of a half type with float32 accumulation. The result has dtype `type`, float32.
at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

// Sums over the first dimension into `sums`.
at::Tensor& sum_rows(const at::Tensor& rows, at::Tensor& sums);

}  // namespace wakesleep::aten
