// Splits a packed [mu | logvar] into two views. The backward operators of the Gaussian ops write both gradients into
// one packed tensor, whose halves autograd passes on separately. If the backward pass of this op receives both halves,
// it returns the packed tensor without a copy.
#include "../ops/checks.h"
#include "function.h"

namespace wakesleep::autograd {
namespace {

// Returns the tensor whose halves are `first` and `second`, or an undefined tensor if there is none.
Tensor packed_of(const Tensor& first, const Tensor& second) {
  if (!first.is_view() || !second.is_view() || !first._base().is_same(second._base())) {
    return {};
  }
  const Tensor packed(first._base());
  const auto begins_at = [&](const Tensor& half, const c10::SymInt& column) {
    return half.sym_strides() == packed.sym_strides() &&
           half.sym_storage_offset() == packed.sym_storage_offset() + column * packed.sym_stride(-1);
  };
  auto shape = first.sym_sizes().vec();
  shape.back() = 2 * shape.back();
  return packed.sym_sizes() == shape && begins_at(first, 0) && begins_at(second, first.sym_size(-1)) ? packed
                                                                                                     : Tensor();
}

struct GaussianParameters : Function<GaussianParameters> {
  static constexpr auto name = "gaussian_parameters";

  static variable_list forward(AutogradContext*, const Tensor& packed) {
    const auto [mu, logvar] = halves(packed);
    return {mu, logvar};
  }

  static variable_list backward(AutogradContext*, const variable_list& grads) {
    const Tensor packed = packed_of(grads[0], grads[1]);
    return {packed.defined() ? packed : at::cat(grads, -1)};
  }
};

Pair gaussian_parameters_of(const Tensor& packed) {  // [*B, 2K]
  constexpr auto op = "gaussian_parameters";
  check_event(op, {"packed", packed});
  TORCH_CHECK_VALUE(packed.sym_size(-1) % 2 == 0, op,
                    ": expected the last dimension of packed to be even, [mu | logvar], got ", packed.sym_size(-1));
  if (!needs_gradient(packed) || is_transformed(packed)) {
    return halves(packed);
  }
  const variable_list outputs = GaussianParameters::apply(packed);
  return {outputs[0], outputs[1]};
}

}  // namespace

WAKESLEEP_COMPOSITE(gaussian_parameters, gaussian_parameters_of)

}  // namespace wakesleep::autograd
