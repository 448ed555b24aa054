// MLPs, which apply layers y = f(h weight^T + bias) in sequence, where f is an activation. This file has the checked
// operands of a call, and the ops that run a backend's kernels.
//
// A chunk of rows passes through all layers, forward or backward, before the next chunk starts. So the output of a
// layer is still in cache when the next layer reads it.
#pragma once

#include "activations.h"
#include "dispatch.h"
#include "linear.h"
#include "registration.h"

namespace wakesleep {

// Returns the op name for error messages. The public API calls an MLP with one layer `linear`.
inline const char* mlp_name(at::TensorList weights) { return weights.size() == 1 ? "linear" : "mlp"; }

struct Mlp : LinearCall {
  c10::SmallVector<Layer, 4> layers;
  Activation hidden_activation, output_activation;
  at::DimVector batch;  // leading dimensions of h
  int64_t N;            // number of rows in the batch
  at::Tensor h;         // [N, H]
  int64_t rows;         // number of rows in a chunk

  Mlp(const at::Tensor& h_in, at::TensorList weights, at::TensorList biases,
      std::optional<std::string_view> activation_in, std::optional<std::string_view> output_activation_in)
      : LinearCall(mlp_name(weights), h_in, weights, biases),
        hidden_activation(activation_of(op, "activation", activation_in)),
        output_activation(
            activation_of(op, weights.size() == 1 ? "activation" : "output_activation", output_activation_in)),
        batch(batch_sizes(h_in)),
        N(c10::multiply_integers(batch)),
        h(as_rows(h_in, N)) {
    int64_t widest = 0;
    for (size_t l = 0; l < weights.size(); ++l) {
      layers.push_back(layer(weights[l], biases[l]));
      widest = std::max(widest, layers[l].D);
    }
    rows = chunk_rows(widest);
  }

  size_t last() const { return layers.size() - 1; }

  // Calls body(activation, Type<scalar_t>{}) with the activation of layer l.
  template <typename Body>
  void dispatch(size_t l, const Body& body) const {
    std::visit([&](auto activation) { dispatch_floating(op, dtype, [&](auto type) { body(activation, type); }); },
               l == last() ? output_activation : hidden_activation);
  }
};

// The ops that run a backend's kernels. The products of a layer are h weight^T. `Kernels` must define these functions:
//
//   write_output(call, layer, products [rows, D], y [rows, D]): writes y, which may alias the products;
//   write_gradient(call, layer, grad_y [rows, D], y [rows, D], grad_products [rows, D], sums [pieces, D]): writes
//     grad_products, which may alias grad_y, and one sum for every rows_of_sum(compute) rows of grad_products;
//   rows_of_sum(compute): returns the number of rows in each partial sum of a gradient.
//
// If kOwnSmallBatches is true, `Kernels` must also define these functions:
//
//   small_batch_limit(): returns the largest batch size for which the next three functions are used;
//   small_batch_output(call, layer, h [N, H]): returns y [N, D];
//   small_batch_gradient(call, grad_y, y): returns the gradient of the last layer's products;
//   small_batch_gradients(call, layer, h, grad_products, grad_weight, grad_bias, grad_a), where h = f(a): writes the
//     last three arguments, except empty tensors.
template <typename Kernels>
struct MlpOps {
  using Tensors = std::vector<at::Tensor>;
  using Name = std::optional<std::string_view>;

  static at::Tensor mlp(const at::Tensor& h,     // [*B, H]
                        at::TensorList weights,  // [D, H] each, where H is the D of the previous layer
                        at::TensorList biases,   // [D] each
                        Name activation, Name output_activation) {
    return forward({h, weights, biases, activation, output_activation}, nullptr);
  }

  // Also returns the output [N, D] of every layer except the last.
  static std::tuple<at::Tensor, Tensors> with_hidden(const at::Tensor& h, at::TensorList weights, at::TensorList biases,
                                                     Name activation, Name output_activation) {
    const Mlp call(h, weights, biases, activation, output_activation);
    Tensors hidden(call.last());
    const at::Tensor output = forward(call, &hidden);
    return {output, hidden};
  }

  static std::tuple<at::Tensor, Tensors, Tensors> backward(const at::Tensor& grad,    // [*B, D]
                                                           const at::Tensor& output,  // [*B, D]
                                                           at::TensorList hidden,     // [N, D] each
                                                           const at::Tensor& h, at::TensorList weights,
                                                           at::TensorList biases, Name activation,
                                                           Name output_activation, bool with_grad_h,
                                                           bool with_grad_weights) {
    const Mlp call(h, weights, biases, activation, output_activation);
    const size_t last = call.last();
    check_result(call, {"grad", grad}, concat(call.batch, {call.layers[last].D}));
    check_result(call, {"output", output}, concat(call.batch, {call.layers[last].D}));
    TORCH_CHECK_VALUE(hidden.size() == last, call.op, ": expected hidden to have ", last, " tensors, got ",
                      hidden.size());
    for (size_t l = 0; l < last; ++l) {
      check_result(call, {"hidden", hidden[l], l}, at::DimVector{call.N, call.layers[l].D});
    }
    if constexpr (Kernels::kOwnSmallBatches) {
      if (call.N <= Kernels::small_batch_limit()) {
        return small_batch_backward(call, grad, output, hidden, with_grad_h, with_grad_weights);
      }
    }
    c10::SmallVector<LayerGradients, 4> gradients;
    for (const Layer& layer : call.layers) {
      gradients.emplace_back(layer, call.N, Kernels::rows_of_sum(call.compute), with_grad_weights);
    }
    const at::Tensor grad_rows = as_rows(grad, call.N).contiguous(), output_rows = as_rows(output, call.N).contiguous();
    Rows grad_h{call.N, call.dtype};
    call.for_chunks(call.h, call.rows, [&](int64_t first, const at::Tensor& h_rows) {
      const auto chunk_of = [&](const at::Tensor& tensor) { return rows_of(tensor, first, h_rows.size(0)); };
      at::Tensor upstream = chunk_of(grad_rows);
      for (size_t l = last;; --l) {
        const at::Tensor y = l == last ? chunk_of(output_rows) : chunk_of(hidden[l].contiguous());
        const at::Tensor below = l == 0 ? h_rows : in_type(chunk_of(hidden[l - 1]), call.operand);
        const bool in_place = l < last && upstream.scalar_type() == call.operand;  // the caller's grad must not change
        const at::Tensor written =
            in_place ? upstream : aten::empty(upstream.sizes(), upstream.options().dtype(call.operand));
        gradients[l].template add<Kernels>(first, below, written, [&](const at::Tensor& sums) {
          Kernels::write_gradient(call, l, upstream, y, written, sums);
        });
        if (l > 0 || with_grad_h) {
          upstream = Kernels::product(written, call.layers[l].weight, call.dtype);
        }
        if (l == 0) {
          break;
        }
      }
      if (with_grad_h) {
        grad_h.put(first, upstream);
      }
    });
    Tensors of_weights, of_biases;
    for (const LayerGradients& of : gradients) {
      of_weights.push_back(in_type(of.weight, call.dtype));
      of_biases.push_back(in_type(of.bias, call.dtype));
    }
    const at::Tensor of_h = grad_h.all(h.size(-1), grad_rows.options());
    return {with_grad_h ? in_batch(of_h, call.batch) : of_h, of_weights, of_biases};
  }

  static void implement(Registrar& m) {
    m.impl("mlp", mlp);
    m.impl("mlp_with_hidden", with_hidden);
    m.impl("mlp_backward", backward);
  }

 private:
  static at::Tensor forward(const Mlp& call, Tensors* hidden) {
    const size_t last = call.last();
    if constexpr (Kernels::kOwnSmallBatches) {
      if (call.N <= Kernels::small_batch_limit()) {
        return small_batch_forward(call, hidden);
      }
    }
    Rows output{call.N, call.dtype};
    c10::SmallVector<Rows, 4> kept(hidden == nullptr ? 0 : last, Rows{call.N, call.dtype});
    const bool in_place = call.dtype == call.compute;
    call.for_chunks(call.h, call.rows, [&](int64_t first, const at::Tensor& h_rows) {
      at::Tensor below = h_rows;
      for (size_t l = 0; l <= last; ++l) {
        const at::Tensor products = Kernels::product(below, call.layers[l].weight.t(), call.compute);
        Rows* whole = l == last ? &output : hidden == nullptr ? nullptr : &kept[l];
        const bool at_once = whole == nullptr || products.size(0) == call.N;
        at::Tensor y = at_once
                           ? (in_place ? products : aten::empty(products.sizes(), call.h.options().dtype(call.dtype)))
                           : whole->place(first, products);
        Kernels::write_output(call, l, products, y);
        if (at_once && whole != nullptr) {
          whole->tensor = y;
        }
        below = in_type(y, call.operand);
      }
    });
    for (size_t l = 0; l < kept.size(); ++l) {
      (*hidden)[l] = kept[l].all(call.layers[l].D, call.h.options());
    }
    return in_batch(output.all(call.layers[last].D, call.h.options()), call.batch);
  }

  static at::Tensor small_batch_forward(const Mlp& call, Tensors* hidden) {
    at::Tensor y = call.h;
    for (size_t l = 0; l <= call.last(); ++l) {
      y = Kernels::small_batch_output(call, l, y);
      if (hidden != nullptr && l < call.last()) {
        (*hidden)[l] = y;
      }
    }
    return in_batch(y, call.batch);
  }

  static std::tuple<at::Tensor, Tensors, Tensors> small_batch_backward(const Mlp& call, const at::Tensor& grad,
                                                                       const at::Tensor& output, at::TensorList hidden,
                                                                       bool with_grad_h, bool with_grad_weights) {
    Tensors of_weights(call.layers.size()), of_biases(call.layers.size());
    const auto options = grad.options();
    at::Tensor upstream = Kernels::small_batch_gradient(call, as_rows(grad, call.N), as_rows(output, call.N));
    for (size_t l = call.last();; --l) {
      const Layer& layer = call.layers[l];
      const at::Tensor of_h = aten::empty({l > 0 || with_grad_h ? call.N : 0, layer.H}, options);
      of_weights[l] = aten::empty({with_grad_weights ? layer.D : 0, layer.H}, options);
      of_biases[l] = aten::empty({layer.D}, options);
      Kernels::small_batch_gradients(call, l, l == 0 ? call.h : hidden[l - 1], upstream, of_weights[l], of_biases[l],
                                     of_h);
      upstream = of_h;
      if (l == 0) {
        return {with_grad_h ? in_batch(of_h, call.batch) : of_h, of_weights, of_biases};
      }
    }
  }

  static void check_result(const Mlp& call, const Argument& argument, at::IntArrayRef shape) {
    check_same_device(call.op, {"h", call.h}, argument);
    TORCH_CHECK_VALUE(argument.tensor.sizes() == shape, call.op, "_backward: expected ", argument, " to have shape ",
                      shape, ", got ", argument.tensor.sizes());
    TORCH_CHECK_TYPE(argument.tensor.scalar_type() == call.dtype, call.op, "_backward: expected ", argument, " to be ",
                     call.dtype, ", that of the parameters, got ", argument.tensor.scalar_type());
  }
};

}  // namespace wakesleep
