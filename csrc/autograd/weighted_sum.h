// Weighted sums of log-likelihoods whose gradients were computed in the forward pass. The backward pass multiplies
// these gradients by the gradient of the sum, unless it is 1.
#pragma once

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/_foreach_mul.h>
#include <torch/csrc/autograd/graph_task.h>

#include "../ops/checks.h"
#include "operators.h"
#include "unit_gradient.h"

namespace wakesleep::autograd {

inline Tensor scaled(const Tensor& tensor, double scale) { return scale == 1 ? tensor : tensor * scale; }

// Returns scale sum_n sample_weight_n log_prob_n.
inline Tensor weighted_sum(const char* op, const Tensor& log_prob, const OptionalTensor& sample_weight, double scale) {
  if (!sample_weight) {
    return scaled(log_prob, scale).sum();
  }
  check_row_weights(op, {"sample_weight", *sample_weight}, log_prob.sym_sizes());
  return (log_prob * scaled(sample_weight->to(log_prob.scalar_type()), scale)).sum();
}

// Returns the gradient of each log-likelihood, in the shape `batch`, given the gradient of their weighted sum.
inline Tensor gradient_of_rows(const Tensor& grad, const Tensor& sample_weight, double scale,
                               c10::SymIntArrayRef batch) {
  const Tensor of_row = scaled(grad, scale);
  return (sample_weight.defined() ? of_row * sample_weight.to(grad.scalar_type()) : of_row).expand_symint(batch);
}

// Returns the gradient of sample_weight, given the gradient of the weighted sum.
inline Tensor gradient_of_weight(const Tensor& grad, const Tensor& log_prob, double scale,
                                 const Tensor& sample_weight) {
  return sum_like(scaled(grad, scale) * log_prob, sample_weight);
}

// Returns true if the scalar is 1 and reading it neither waits for a GPU nor breaks a trace.
inline bool is_one(const Tensor& scalar) {
  return is_unit_gradient(scalar) ||
         (scalar.is_cpu() && !at::isTensorSubclassLike(scalar) && scalar.item<double>() == 1);
}

// Scales the gradients from the forward pass by a scalar. This happens in place unless the graph is retained. If the
// sum is itself the loss, the scalar is 1. Skipping the multiplication then saves a pass over gradients as large as the
// weights.
inline variable_list times(c10::IValue& formed, const Tensor& scalar) {
  variable_list gradients = formed.toTensorVector();
  if (is_transformed(scalar)) {  // vmap does not know _foreach_mul
    for (Tensor& gradient : gradients) {
      gradient = gradient * scalar;
    }
    return gradients;
  }
  if (torch::autograd::get_current_graph_task_keep_graph()) {
    return at::_foreach_mul(gradients, scalar);
  }
  formed = c10::IValue();
  if (!is_one(scalar)) {
    at::_foreach_mul_(gradients, scalar);
  }
  return gradients;
}

}  // namespace wakesleep::autograd
