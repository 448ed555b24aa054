// Activations and their gradients as differentiable operations of torch.
#pragma once

#include <ATen/ops/sigmoid_backward.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "../ops/activation.h"
#include "operators.h"

namespace wakesleep::autograd {

// Returns the activation of one layer of several.
inline Activation layer_activation(size_t layer, size_t layers, OptionalName activation,
                                   OptionalName output_activation) {
  return activation_of("mlp", "activation", layer + 1 == layers ? output_activation : activation);
}

inline Tensor activated(Activation activation, const Tensor& a) {
  switch (activation) {
    case Activation::relu:
      return a.relu();
    case Activation::sigmoid:
      return a.sigmoid();
    case Activation::tanh:
      return a.tanh();
    default:
      return a;
  }
}

// Returns the gradient of a, given the gradient of y = f(a).
inline Tensor gradient_of_products(Activation activation, const Tensor& grad, const Tensor& y) {
  switch (activation) {
    case Activation::relu:
      return at::threshold_backward(grad, y, 0);
    case Activation::sigmoid:
      return at::sigmoid_backward(grad, y);
    case Activation::tanh:
      return at::tanh_backward(grad, y);
    default:
      return grad;
  }
}

}  // namespace wakesleep::autograd
