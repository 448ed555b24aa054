// Gradients of y = tanh(h weight^T + bias). With g = (1 - y^2) times what comes from upstream: g weight for h, g^T h
// for weight, the sum of g for bias. What is kept for the backward is y.
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "operators.h"

namespace wakesleep::autograd {
namespace {

struct LinearTanh : torch::autograd::Function<LinearTanh> {
  static Tensor forward(AutogradContext* context, const Tensor& h, const Tensor& weight, const Tensor& bias) {
    const Tensor activations = below(linear_tanh(), h, weight, bias);
    context->save_for_backward({h, weight, bias, activations});
    return activations;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &bias = saved[2], &activations = saved[3];
    const bool with_grad_h = context->needs_input_grad(0), with_grad_weight = context->needs_input_grad(1);
    const auto [grad_h, grad_weight, grad_bias] = linear_tanh_backward().call(
        grads[0].to(activations.scalar_type()), activations, h, weight, bias, with_grad_h, with_grad_weight);
    return {with_grad_h ? grad_h : Tensor(), with_grad_weight ? grad_weight : Tensor(), grad_bias};
  }
};

Tensor activations(const Tensor& h, const Tensor& weight, const Tensor& bias) {
  return needs_gradient(h, weight, bias) ? LinearTanh::apply(h, weight, bias) : below(linear_tanh(), h, weight, bias);
}

// The backward itself differentiates through the formula.
Triple activations_backward(const Tensor& grad, const Tensor& activations, const Tensor& h, const Tensor& weight,
                            const Tensor& bias, bool with_grad_h, bool with_grad_weight) {
  if (!needs_gradient(grad, activations, h, weight, bias)) {
    return below(linear_tanh_backward(), grad, activations, h, weight, bias, with_grad_h, with_grad_weight);
  }
  const auto type = activations.scalar_type();
  const Tensor wide_h = h.to(type), wide_weight = weight.to(type);
  const Tensor y = at::linear(wide_h, wide_weight, bias.to(type)).tanh();
  const Tensor grad_products = grad * (1 - y * y);
  const auto rows = [](const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); };
  const Tensor none = at::zeros_symint({0, h.sym_size(-1)}, grad.options());
  return {with_grad_h ? at::matmul(grad_products, wide_weight) : none,
          with_grad_weight ? at::mm(rows(grad_products).t(), rows(wide_h)) : none, rows(grad_products).sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("linear_tanh", activations);
  m.impl("linear_tanh_backward", activations_backward);
}

}  // namespace wakesleep::autograd
