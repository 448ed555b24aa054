// KL(N(mu, diag e^logvar) || N(0, I)) and its gradients.
#include "gaussian.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor gaussian_kl(const at::Tensor& mu,        // [*B, K]
                       const at::Tensor& logvar) {  // [*B, K]
  const GaussianParameters of("gaussian_kl", mu, logvar);
  const at::Tensor kl = at::empty(of.batch, of.compute_options());
  const auto rows = map_rows<2>(of.batch, {row_strides(of.mu, of.batch), row_strides(of.logvar, of.batch)});
  compute(kl.device(), GaussianKl{dtype_of(of.mu), read(of.mu), read(of.logvar), write(kl), rows, of.K});
  return kl;
}

at::Tensor gaussian_kl_backward(const at::Tensor& grad_in,   // [*B]
                                const at::Tensor& mu,        // [*B, K]
                                const at::Tensor& logvar) {  // [*B, K]
  constexpr auto op = "gaussian_kl_backward";
  const GaussianParameters of(op, mu, logvar);
  const at::Tensor grad = check_row_gradient(op, "grad", grad_in, of.batch, {"mu", of.mu});
  const at::Tensor grad_parameters = at::empty(of.packed_shape(), of.mu.options());
  const auto rows = map_rows<3>(
      of.batch, {row_strides(of.mu, of.batch), row_strides(of.logvar, of.batch), row_strides(grad, of.batch, 0)});
  compute(grad.device(), GaussianKlBackward{dtype_of(of.mu), read(of.mu), read(of.logvar), read(grad),
                                            write(grad_parameters), rows, of.K});
  return grad_parameters;
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("gaussian_kl_backward", gaussian_kl_backward);
}

}  // namespace wakesleep
