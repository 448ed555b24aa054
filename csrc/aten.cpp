// Implements the functions of aten.h by calling torch.
#include "aten.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

namespace wakesleep::aten {

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }

at::Tensor empty_like(const at::Tensor& tensor) { return at::empty_like(tensor); }

at::Tensor zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }

at::Tensor mm(const at::Tensor& a, const at::Tensor& b, at::ScalarType type) { return at::mm(a, b, type); }

at::Tensor& sum_rows(const at::Tensor& rows, at::Tensor& sums) { return at::sum_out(sums, rows, 0); }

}  // namespace wakesleep::aten
