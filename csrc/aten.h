// Declares the functions of torch that kernels call. torch's own header of any of these includes ATen/Context.h, which
// takes 5 s to compile. Methods of at::Tensor cost nothing more: they come with ATen/core/Tensor.h.
#pragma once

#include <ATen/core/Tensor.h>

namespace wakesleep::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);
at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// The product of matrices of half types, accumulated and returned in float32.
at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType type);

// Sums over the first dimension, written to `sums`.
at::Tensor& sum_rows(const at::Tensor& rows, at::Tensor& sums);

}  // namespace wakesleep::aten
