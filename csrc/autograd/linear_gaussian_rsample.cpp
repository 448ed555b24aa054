// A Gaussian head in terms of the ops that it joins. This gives its gradients, and its members under vmap.
#include "function.h"

namespace wakesleep::autograd {
namespace {

Tensor composed(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& key,
                c10::SymIntArrayRef sample_shape) {
  const Tensor packed = mlp().call(h, {weight}, {bias}, std::nullopt, std::nullopt);
  const auto [mu, logvar] = gaussian_parameters().call(packed);
  return gaussian_rsample().call(mu, logvar, key, sample_shape);
}

Tensor linear_gaussian_rsample_of(const Tensor& h, const Tensor& weight, const Tensor& bias, const Tensor& key,
                                  c10::SymIntArrayRef sample_shape) {
  return needs_gradient(h, weight, bias) ? composed(h, weight, bias, key, sample_shape)
                                         : below(linear_gaussian_rsample(), h, weight, bias, key, sample_shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) { m.impl("linear_gaussian_rsample", linear_gaussian_rsample_of); }
TORCH_LIBRARY_IMPL(wakesleep_ext, FuncTorchBatchedDecomposition, m) { m.impl("linear_gaussian_rsample", composed); }

}  // namespace wakesleep::autograd
