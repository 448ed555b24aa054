// Gradients of an MLP with layers y = f(h weight^T + bias). For each layer, g is f' times the upstream gradient. The
// gradient of weight is g^T h, and the gradient of bias is the sum of g over the rows. The upstream gradient of the
// previous layer is g weight. The graph saves the output y of every layer. It omits the output of the last layer if
// that layer has no activation.
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>

#include "activation_formulas.h"
#include "function.h"

namespace wakesleep::autograd {
namespace {

using Tensors = std::vector<Tensor>;

c10::IValue name_value(OptionalName name) { return name ? c10::IValue(std::string(*name)) : c10::IValue(); }

struct Mlp : Function<Mlp> {
  static constexpr auto name = "mlp";

  static Tensor forward(AutogradContext* context, const Tensor& h, at::TensorList weights, at::TensorList biases,
                        OptionalName activation, OptionalName output_activation) {
    const auto [output, hidden] = below(mlp_with_hidden(), h, weights, biases, activation, output_activation);
    variable_list saved = {h, output_activation ? output : Tensor()};
    for (const at::TensorList of : {weights, biases, at::TensorList(hidden)}) {
      saved.insert(saved.end(), of.begin(), of.end());
    }
    context->save_for_backward(std::move(saved));
    context->saved_data["activations"] =
        c10::ivalue::Tuple::create(name_value(activation), name_value(output_activation));
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const size_t layers = (saved.size() - 1) / 3;  // saved: h, y, L weights, L biases, L - 1 hidden
    const auto part = [&](size_t first, size_t count) { return at::TensorList(saved).slice(first, count); };
    const auto weights = part(2, layers), biases = part(2 + layers, layers), hidden = part(2 + 2 * layers, layers - 1);
    const auto& names = context->saved_data["activations"].toTupleRef().elements();
    const auto activation = names[0].toOptional<std::string>(), output_activation = names[1].toOptional<std::string>();
    bool with_grad_weights = false;
    for (size_t l = 0; l < layers; ++l) {
      with_grad_weights |= context->needs_input_grad(1 + l);
    }
    const bool with_grad_h = context->needs_input_grad(0);
    auto [grad_h, of_weights, of_biases] =
        mlp_backward().call(grads[0], saved[1].defined() ? saved[1] : grads[0], hidden, saved[0], weights, biases,
                            activation, output_activation, with_grad_h, with_grad_weights);
    variable_list result = {with_grad_h ? grad_h : Tensor()};
    for (size_t l = 0; l < layers; ++l) {
      result.push_back(context->needs_input_grad(1 + l) ? of_weights[l] : Tensor());
    }
    result.insert(result.end(), of_biases.begin(), of_biases.end());
    result.resize(result.size() + 2);
    return result;
  }
};

// Returns h and the output of each layer as differentiable operations.
Tensors differentiable_outputs(const Tensor& h, at::TensorList weights, at::TensorList biases, OptionalName activation,
                               OptionalName output_activation) {
  const at::ScalarType type = promoted(h, weights, biases);
  const auto compute = compute_dtype(type);
  Tensors outputs = {h.to(type)};
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor a = at::linear(outputs[l].to(compute), weights[l].to(compute), biases[l].to(compute));
    outputs.push_back(activated(layer_activation(l, weights.size(), activation, output_activation), a).to(type));
  }
  return outputs;
}

Tensor mlp_of(const Tensor& h, at::TensorList weights, at::TensorList biases, OptionalName activation,
              OptionalName output_activation) {
  if (!needs_gradient(h) && !needs_gradients(weights) && !needs_gradients(biases)) {
    return below(mlp(), h, weights, biases, activation, output_activation);
  }
  if (is_transformed(h) || std::any_of(weights.begin(), weights.end(), is_transformed<Tensor>)) {
    return differentiable_outputs(h, weights, biases, activation, output_activation).back();
  }
  return Mlp::apply(h, weights, biases, activation, output_activation);
}

// Double backward: autograd differentiates this formula instead of the kernel.
std::tuple<Tensor, Tensors, Tensors> mlp_backward_of(const Tensor& grad, const Tensor& output, at::TensorList hidden,
                                                     const Tensor& h, at::TensorList weights, at::TensorList biases,
                                                     OptionalName activation, OptionalName output_activation,
                                                     bool with_grad_h, bool with_grad_weights) {
  if (!needs_gradient(grad, output, h) && !needs_gradients(hidden) && !needs_gradients(weights) &&
      !needs_gradients(biases)) {
    return below(mlp_backward(), grad, output, hidden, h, weights, biases, activation, output_activation, with_grad_h,
                 with_grad_weights);
  }
  const size_t layers = weights.size();
  const auto type = output.scalar_type();
  const Tensors given = differentiable_outputs(h, weights, biases, activation, output_activation);
  const auto rows = [](const Tensor& tensor) { return tensor.reshape_symint({-1, tensor.sym_size(-1)}); };
  Tensors of_weights(layers), of_biases(layers);
  Tensor upstream = grad;
  for (size_t l = layers; l-- > 0;) {
    const Tensor of_products =
        gradient_of_products(layer_activation(l, layers, activation, output_activation), upstream, given[l + 1]);
    of_weights[l] = with_grad_weights ? at::mm(rows(of_products).t(), rows(given[l]))
                                      : at::zeros_symint({0, weights[l].sym_size(1)}, grad.options());
    of_biases[l] = rows(of_products).sum(0);
    if (l > 0 || with_grad_h) {
      upstream = at::matmul(of_products, weights[l].to(type));
    }
  }
  return {with_grad_h ? upstream : at::zeros_symint({0, h.sym_size(-1)}, grad.options()), of_weights, of_biases};
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("mlp", mlp_of);
  m.impl("mlp_backward", mlp_backward_of);
}

}  // namespace wakesleep::autograd
