// MLPs, which apply layers y = f(h weight^T + bias) in sequence, where f is an activation.
//
// A chunk of rows passes through all layers, forward or backward, before the next chunk starts. So the output of a
// layer is still in cache when the next layer reads it. A small batch is one chunk, whose layers are computed at once.
#include "activation.h"
#include "layers.h"
#include "register.h"

namespace wakesleep {
namespace {

using Tensors = std::vector<at::Tensor>;
using Name = std::optional<std::string_view>;

// Returns the op name for error messages. The public API calls an MLP with one layer `linear`.
const char* mlp_name(at::TensorList weights) { return weights.size() == 1 ? "linear" : "mlp"; }

struct Mlp : LayerCall {
  c10::SmallVector<Layer, 4> layers;
  Activation hidden_activation, output_activation;
  at::DimVector batch;  // leading dimensions of h
  int64_t N;            // number of rows in the batch
  at::Tensor h;         // [N, H]
  Method method;
  int64_t rows;  // number of rows in a chunk

  Mlp(const at::Tensor& h_in, at::TensorList weights, at::TensorList biases, Name activation, Name output_activation_in)
      : LayerCall(mlp_name(weights), h_in, weights, biases),
        hidden_activation(activation_of(op, "activation", activation)),
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
    method = method_for(Gemm::of_layer(h, layers[0].weight));
    // packed_gemm is as fast in chunks, and its gradients are faster
    const bool is_one_call = layers.size() == 1 && dtype == operand && method != Method::packed_gemm &&
                             has_layer_output(method, output_activation);
    rows = method == Method::small_batch || is_one_call ? std::max<int64_t>(1, N) : chunk_rows(widest);
  }

  size_t last() const { return layers.size() - 1; }
  Activation activation(size_t l) const { return l == last() ? output_activation : hidden_activation; }
};

// ---- forward -------------------------------------------------------------------------------------------------------

// Returns the output of layer l for a chunk of rows. The output is written to `place`, unless that is undefined.
at::Tensor chunk_output(const Mlp& call, size_t l, const at::Tensor& h, at::Tensor place) {
  const Layer& layer = call.layers[l];
  const auto options = call.h.options().dtype(call.dtype);
  if (call.method == Method::small_batch) {
    const SmallBatch small(h, layer, call.dtype);
    const at::Tensor y = at::empty({h.size(0), layer.D}, options);
    small.compute(SmallBatchOutput{small.layer(), call.activation(l), read(layer.bias), write(y)});
    return y;
  }
  const Gemm gemm = Gemm::of_layer(h, layer.weight);
  const Method method = method_for(gemm);
  if (call.dtype == call.operand && has_layer_output(method, call.activation(l))) {
    return layer_output(method, gemm, call.activation(l), h, layer.weight, layer.bias, place);
  }
  const at::Tensor products = product(h, layer.weight.t(), call.compute);
  if (!place.defined()) {
    place = call.dtype == call.compute ? products : at::empty(products.sizes(), options);
  }
  compute(call.device, MlpOutput{dtype_of(place), call.activation(l), read(products), read(layer.bias), write(place),
                                 products.size(0), layer.D, products.stride(0), place.stride(0)});
  return place;
}

// Returns the output. `hidden`, if not null, receives the output [N, D] of every layer except the last.
at::Tensor forward(const Mlp& call, Tensors* hidden) {
  const BelowAutograd below_autograd;
  const size_t last = call.last();
  Rows output{call.N, call.dtype};
  c10::SmallVector<Rows, 4> kept(hidden == nullptr ? 0 : last, Rows{call.N, call.dtype});
  call.for_chunks(call.h, call.rows, [&](int64_t first, const at::Tensor& h_rows) {
    at::Tensor below = h_rows;
    for (size_t l = 0; l <= last; ++l) {
      Rows* whole = l == last ? &output : hidden == nullptr ? nullptr : &kept[l];
      const int64_t rows = h_rows.size(0);
      const bool at_once = whole == nullptr || rows == call.N;
      const at::Tensor place = at_once ? at::Tensor() : whole->place(first, {rows, call.layers[l].D}, call.h.options());
      const at::Tensor y = chunk_output(call, l, below, place);
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

std::tuple<at::Tensor, Tensors> mlp_with_hidden(const at::Tensor& h, at::TensorList weights, at::TensorList biases,
                                                Name activation, Name output_activation) {
  const Mlp call(h, weights, biases, activation, output_activation);
  Tensors hidden(call.last());
  const at::Tensor output = forward(call, &hidden);
  return {output, hidden};
}

// ---- backward ------------------------------------------------------------------------------------------------------

void check_result(const Mlp& call, const Argument& argument, at::IntArrayRef shape) {
  check_same_device(call.op, {"h", call.h}, argument);
  TORCH_CHECK_VALUE(argument.tensor.sizes() == shape, call.op, "_backward: expected ", argument, " to have shape ",
                    shape, ", got ", argument.tensor.sizes());
  TORCH_CHECK_TYPE(argument.tensor.scalar_type() == call.dtype, call.op, "_backward: expected ", argument, " to be ",
                   call.dtype, ", that of the parameters, got ", argument.tensor.scalar_type());
}

void check_results(const Mlp& call, const at::Tensor& grad, const at::Tensor& output, at::TensorList hidden) {
  const size_t last = call.last();
  check_result(call, {"grad", grad}, concat(call.batch, {call.layers[last].D}));
  check_result(call, {"output", output}, concat(call.batch, {call.layers[last].D}));
  TORCH_CHECK_VALUE(hidden.size() == last, call.op, ": expected hidden to have ", last, " tensors, got ",
                    hidden.size());
  for (size_t l = 0; l < last; ++l) {
    check_result(call, {"hidden", hidden[l], l}, at::DimVector{call.N, call.layers[l].D});
  }
}

// Returns the gradient of the products of layer l for a chunk of rows, given the gradient of its output y.
at::Tensor gradient_of_products(const Mlp& call, size_t l, int64_t first, const at::Tensor& grad, const at::Tensor& y,
                                LayerGradients& gradients) {
  const auto dtype = call.operand;
  const bool has_dtype = grad.scalar_type() == dtype;
  const bool is_same = has_dtype && call.activation(l) == Activation::identity;
  const bool in_place = is_same || (has_dtype && l < call.last());  // the caller's grad must not change
  const at::Tensor written = in_place ? grad : at::empty(grad.sizes(), grad.options().dtype(dtype));
  const at::Tensor sums = gradients.sums(first, grad.size(0));
  if (!is_same || sums.defined()) {
    compute(call.device, MlpGradient{dtype_of(grad), call.activation(l), read(grad), read(y), dtype_of(written),
                                     is_same ? nullptr : write(written), write(sums), grad.size(0), call.layers[l].D,
                                     written.stride(0)});
  }
  return written;
}

std::tuple<at::Tensor, Tensors, Tensors> mlp_backward(const at::Tensor& grad,    // [*B, D]
                                                      const at::Tensor& output,  // [*B, D]
                                                      at::TensorList hidden,     // [N, D] each
                                                      const at::Tensor& h, at::TensorList weights,
                                                      at::TensorList biases, Name activation, Name output_activation,
                                                      bool with_grad_h, bool with_grad_weights) {
  const BelowAutograd below_autograd;
  const Mlp call(h, weights, biases, activation, output_activation);
  check_results(call, grad, output, hidden);
  const size_t last = call.last();
  c10::SmallVector<LayerGradients, 4> gradients;
  for (const Layer& layer : call.layers) {
    gradients.emplace_back(call, layer, call.method, call.N, with_grad_weights);
  }
  const at::Tensor grad_rows = as_rows(grad, call.N).contiguous(), output_rows = as_rows(output, call.N).contiguous();
  Rows grad_h{call.N, call.dtype};
  const bool is_small = call.method == Method::small_batch;
  call.for_chunks(call.h, call.rows, [&](int64_t first, const at::Tensor& h_rows) {
    const auto chunk_of = [&](const at::Tensor& tensor) { return rows_of(tensor, first, h_rows.size(0)); };
    at::Tensor g = chunk_of(grad_rows), y = chunk_of(output_rows);  // the gradient of the output of layer l, and it
    for (size_t l = last + 1; l-- > 0;) {
      const bool reads_output = is_small && l == last && call.output_activation != Activation::identity;
      const LayerOutput output = reads_output ? LayerOutput{call.output_activation, y} : LayerOutput{};
      if (!is_small) {
        g = gradient_of_products(call, l, first, g, y, gradients[l]);
      }
      y = l == 0 ? h_rows : chunk_of(hidden[l - 1].contiguous());
      const at::Tensor given = in_type(y, call.operand);
      const Activation f = l == 0 ? Activation::identity : call.activation(l - 1);
      const bool with_input = l > 0 || with_grad_h;
      g = is_small ? gradients[l].small_batch_add(given, f, g, output, {}, with_input)
                   : gradients[l].add(first, given, f, g, with_input);
    }
    if (with_grad_h) {
      grad_h.put(first, g);
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

}  // namespace

at::Tensor mlp(const at::Tensor& h, at::TensorList weights, at::TensorList biases, Name activation,
               Name output_activation) {
  return forward({h, weights, biases, activation, output_activation}, nullptr);
}

WAKESLEEP_OPS(m) {
  m.impl("mlp", mlp);
  m.impl("mlp_with_hidden", mlp_with_hidden);
  m.impl("mlp_backward", mlp_backward);
}

}  // namespace wakesleep
