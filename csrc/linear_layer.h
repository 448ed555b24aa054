// Layers y = f(h weight^T + bias), f being an activation: checked operands of a call, and the ops over a backend's
// kernels.
#pragma once

#include <torch/library.h>

#include "activations.h"
#include "dispatch.h"
#include "linear.h"

namespace wakesleep {

struct LinearLayer : Linear {
  Activation activation;
  at::DimVector batch;  // leading dimensions of h
  int64_t N;            // rows of the batch
  at::Tensor h;         // [N, H]

  LinearLayer(const char* op_in, const at::Tensor& h_in, const at::Tensor& weight_in, const at::Tensor& bias_in,
              std::optional<std::string_view> activation_in)
      : Linear(op_in, h_in, weight_in, bias_in),
        activation(activation_of(op_in, activation_in)),
        batch(batch_sizes(h_in)),
        N(c10::multiply_integers(batch)),
        h(h_in.reshape({N, H})) {}
};

// body(activation, Type<scalar_t>{}) for those of a call.
template <typename Body>
void dispatch(const LinearLayer& call, const Body& body) {
  std::visit(
      [&](auto activation) { dispatch_floating(call.op, call.dtype, [&](auto type) { body(activation, type); }); },
      call.activation);
}

// write_output(call, products [rows, D], y [rows, D]) and write_gradient(call, gradient of y [rows, D], y [rows, D],
// gradient of the products [rows, D], its sums over every rows_of_sum(compute) rows [pieces, D]).
template <typename Kernels>
struct LinearOps {
  static at::Tensor linear(const at::Tensor& h,       // [*B, H]
                           const at::Tensor& weight,  // [D, H]
                           const at::Tensor& bias,    // [D]
                           std::optional<std::string_view> activation) {
    const LinearLayer call("linear", h, weight, bias, activation);
    const at::Tensor output = at::empty({call.N, call.D}, call.weight.options().dtype(call.dtype));
    call.for_products(call.h, false, [&](int64_t first, const at::Tensor&, const at::Tensor& products) {
      Kernels::write_output(call, products, rows_of(output, first, products.size(0)));
    });
    return output.view(concat(call.batch, {call.D}));
  }

  static std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad,    // [*B, D]
                                                                 const at::Tensor& output,  // [*B, D]
                                                                 const at::Tensor& h, const at::Tensor& weight,
                                                                 const at::Tensor& bias,
                                                                 std::optional<std::string_view> activation,
                                                                 bool with_grad_h, bool with_grad_weight) {
    const LinearLayer call("linear_backward", h, weight, bias, activation);
    for (const Argument& argument : {Argument{"grad", grad}, Argument{"output", output}}) {
      check_same_device(call.op, {"h", h}, argument);
      TORCH_CHECK_VALUE(argument.tensor.sizes() == at::IntArrayRef(concat(call.batch, {call.D})), call.op,
                        ": expected ", argument.name, " to have shape ", concat(call.batch, {call.D}), ", got ",
                        argument.tensor.sizes());
      TORCH_CHECK_TYPE(argument.tensor.scalar_type() == call.dtype, call.op, ": expected ", argument.name, " to be ",
                       call.dtype, ", that of the parameters, got ", argument.tensor.scalar_type());
    }
    const auto flat = [&](const at::Tensor& tensor) { return tensor.reshape({call.N, call.D}).contiguous(); };
    const at::Tensor grad_rows = flat(grad), output_rows = flat(output);
    LinearGradients gradients(call, call.N, Kernels::rows_of_sum(call.compute), with_grad_h, with_grad_weight);
    const at::Tensor buffer = call.chunk(call.N, call.operand);
    call.for_chunks(call.h, call.chunk_rows(), [&](int64_t first, const at::Tensor& h_rows) {
      const int64_t count = h_rows.size(0);
      const at::Tensor written = rows_of(buffer, 0, count);
      gradients.add(first, h_rows, written, [&](const at::Tensor& sums) {
        Kernels::write_gradient(call, rows_of(grad_rows, first, count), rows_of(output_rows, first, count), written,
                                sums);
      });
    });
    return gradients.result(call.batch);
  }

  static void implement(torch::Library& m) {
    m.impl("linear", linear);
    m.impl("linear_backward", backward);
  }
};

}  // namespace wakesleep
