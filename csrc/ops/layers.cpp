#include "layers.h"

#include <limits>

#include "../settings.h"

namespace wakesleep {

at::ScalarType check_layers(const char* op, const at::Tensor& h, at::TensorList weights, at::TensorList biases) {
  const bool one = weights.size() == 1;
  const Argument h_argument = {"h", h};
  check_floating(op, h_argument);
  check_event(op, h_argument);
  TORCH_CHECK_VALUE(!weights.empty(), op, ": expected weights to have at least one layer, got none");
  TORCH_CHECK_VALUE(weights.size() == biases.size(), op, ": expected as many biases as weights, ", weights.size(),
                    ", got ", biases.size());
  at::ScalarType dtype = h.scalar_type();
  for (size_t l = 0; l < weights.size(); ++l) {
    const auto index = one ? std::nullopt : std::optional(l);
    const Argument weight = {one ? "weight" : "weights", weights[l], index};
    const Argument bias = {one ? "bias" : "biases", biases[l], index};
    for (const Argument& argument : {weight, bias}) {
      check_floating(op, argument);
      check_same_device(op, h_argument, argument);
      dtype = c10::promoteTypes(dtype, argument.tensor.scalar_type());
    }
    TORCH_CHECK_VALUE(weight.tensor.dim() == 2, op, ": expected ", weight, " to have shape [D, H], got ",
                      weight.tensor.sizes());
    const int64_t D = weight.tensor.size(0), H = weight.tensor.size(1);
    if (l == 0) {
      TORCH_CHECK_VALUE(h.size(-1) == H, op, ": expected the last dimension of h to be ", H, ", that of ", weight,
                        ", got ", h.size(-1));
    } else {
      TORCH_CHECK_VALUE(weights[l - 1].size(0) == H, op, ": expected ", weight, " to have ", weights[l - 1].size(0),
                        " columns, one for each row of the previous layer's weight, got ", H);
    }
    TORCH_CHECK_VALUE(bias.tensor.dim() == 1 && bias.tensor.size(0) == D, op, ": expected ", bias, " to have shape [",
                      D, "], one for each row of ", weight, ", got ", bias.tensor.sizes());
  }
  return dtype;
}

int64_t LayerCall::chunk_rows(int64_t columns) const {
  constexpr int64_t kMiB = 1 << 20, kFewest = 32, kMostMib = std::numeric_limits<int64_t>::max() / kMiB;
  const int64_t chosen_mib = settings::chunk_mib.get().value_or(device.is_cuda() ? 48 : at::get_num_threads());
  const int64_t row_bytes = std::max<int64_t>(1, columns) * static_cast<int64_t>(c10::elementSize(compute));
  return std::max(kFewest, std::min(chosen_mib, kMostMib) * kMiB / row_bytes / kFewest * kFewest);
}

LayerGradients::LayerGradients(const LayerCall& call, const Layer& layer, Method method, int64_t N, bool with_weight)
    : call_(call),
      layer_(layer),
      method_(method),
      N_(N),
      rows_of_sum_(backend_of(call.device).rows_of_sum(dtype_of(call.compute))),
      with_weight_(with_weight) {
  const bool is_small = method == Method::small_batch;
  const auto options = layer.bias.options().dtype(is_small ? call.dtype : call.compute);
  const auto tensor = [&](at::IntArrayRef shape) {
    return N == 0 ? at::zeros(shape, options) : at::empty(shape, options);
  };
  bias = tensor({layer.D});
  if (!with_weight) {
    weight = tensor({0, layer.H});
  } else if (is_small || N == 0) {
    weight = tensor({layer.D, layer.H});  // otherwise, it is the product of the first chunk
  }
}

at::Tensor LayerGradients::sums(int64_t first, int64_t rows) {
  if (method_ == Method::small_batch) {
    return {};
  }
  const int64_t count = (rows + rows_of_sum_ - 1) / rows_of_sum_;
  if (first == 0 && count == 1) {
    sums_.reset();
    return bias.unsqueeze(0);
  }
  sums_ = at::empty({count, layer_.D}, bias.options());
  return sums_;
}

at::Tensor LayerGradients::add(int64_t first, const at::Tensor& h, Activation f, const at::Tensor& g, bool with_input) {
  if (method_ == Method::small_batch) {
    return small_batch_add(h, f, g, {}, {}, with_input);
  }
  if (sums_.defined()) {
    sum_pieces(sums_, bias, first != 0);
    sums_.reset();
  }
  const at::Tensor factor = in_type(g, call_.operand);
  if (with_weight_) {
    const at::ScalarType type = h.size(0) == N_ ? call_.dtype : call_.compute;
    first == 0 ? void(weight = fast_product(factor.t(), h, type)) : add_product(weight, factor.t(), h);
  }
  return with_input ? product(factor, layer_.weight, call_.dtype) : at::Tensor();
}

at::Tensor LayerGradients::small_batch_add(const at::Tensor& h, Activation f, const at::Tensor& grad,
                                           const LayerOutput& output, const Terms& terms, bool with_input) {
  const SmallBatch small(h, layer_, call_.dtype);
  const at::Tensor grad_a = at::empty({with_input ? h.size(0) : 0, layer_.H}, bias.options());
  const auto unless_empty = [](const at::Tensor& tensor) { return tensor.numel() > 0 ? write(tensor) : nullptr; };
  small.compute(SmallBatchGradients{small.layer(), f, output.activation, read(grad), read(output.y),
                                    unless_empty(weight), unless_empty(bias), unless_empty(grad_a), terms});
  return grad_a;
}

}  // namespace wakesleep
