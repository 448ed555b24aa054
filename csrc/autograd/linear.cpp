// Gradients of y = f(h weight^T + bias). With g = f' times what comes from upstream: g weight for h, g^T h for weight,
// the sum of g for bias. What is kept for the backward is y, or nothing if there is no activation.
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "../activations.h"
#include "operators.h"

namespace wakesleep::autograd {
namespace {

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& h, const Tensor& weight, const Tensor& bias,
                        OptionalName activation) {
    const Tensor output = below(linear(), h, weight, bias, activation);
    context->save_for_backward({h, weight, bias, activation ? output : Tensor()});
    context->saved_data["activation"] = activation ? c10::IValue(std::string(*activation)) : c10::IValue();
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &bias = saved[2], &output = saved[3];
    const auto activation = context->saved_data["activation"].toOptional<std::string>();
    const bool with_grad_h = context->needs_input_grad(0), with_grad_weight = context->needs_input_grad(1);
    const auto [grad_h, grad_weight, grad_bias] = linear_backward().call(
        grads[0], output.defined() ? output : grads[0], h, weight, bias, activation, with_grad_h, with_grad_weight);
    return {with_grad_h ? grad_h : Tensor(), with_grad_weight ? grad_weight : Tensor(), grad_bias, Tensor()};
  }
};

Tensor layer(const Tensor& h, const Tensor& weight, const Tensor& bias, OptionalName activation) {
  return needs_gradient(h, weight, bias) ? Linear::apply(h, weight, bias, activation)
                                         : below(linear(), h, weight, bias, activation);
}

// The gradient of a, given that of y = f(a), as a function of a.
Tensor grad_products(const Tensor& grad, const Tensor& a, const Activation& activation) {
  struct Differentiable {
    const Tensor &grad, &a;
    Tensor operator()(Identity) const { return grad; }
    Tensor operator()(Relu) const { return at::where(a <= 0, at::zeros_like(grad), grad); }
    Tensor operator()(Sigmoid f) const { return f.gradient(grad, a.sigmoid()); }
    Tensor operator()(Tanh f) const { return f.gradient(grad, a.tanh()); }
  };
  return std::visit(Differentiable{grad, a}, activation);
}

// The backward itself differentiates through the formula.
Triple layer_backward(const Tensor& grad, const Tensor& output, const Tensor& h, const Tensor& weight,
                      const Tensor& bias, OptionalName activation, bool with_grad_h, bool with_grad_weight) {
  if (!needs_gradient(grad, output, h, weight, bias)) {
    return below(linear_backward(), grad, output, h, weight, bias, activation, with_grad_h, with_grad_weight);
  }
  const auto type = output.scalar_type();
  const Tensor wide_h = h.to(type), wide_weight = weight.to(type);
  const Tensor a = at::linear(wide_h, wide_weight, bias.to(type));
  const Tensor of_products = grad_products(grad, a, activation_of("linear_backward", activation));
  const auto rows = [](const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); };
  const Tensor none = at::zeros_symint({0, h.sym_size(-1)}, grad.options());
  return {with_grad_h ? at::matmul(of_products, wide_weight) : none,
          with_grad_weight ? at::mm(rows(of_products).t(), rows(wide_h)) : none, rows(of_products).sum(0)};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("linear", layer);
  m.impl("linear_backward", layer_backward);
}

}  // namespace wakesleep::autograd
