// KL(N(mu, diag e^logvar) || N(prior_mu, diag e^prior_logvar)) and its gradients.
#include "gaussian.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor gaussian_kl_between(const at::Tensor& mu,              // [*B, K]
                               const at::Tensor& logvar,          // [*B, K]
                               const at::Tensor& prior_mu,        // [*B, K]
                               const at::Tensor& prior_logvar) {  // [*B, K]
  const GaussianWithPrior of("gaussian_kl_between", mu, logvar, prior_mu, prior_logvar);
  const auto& batch = of.joint_batch;
  const at::Tensor kl = at::empty(batch, of.compute_options());
  const auto rows = map_rows<4>(batch, {row_strides(of.mu, batch), row_strides(of.logvar, batch),
                                        row_strides(of.prior.mu, batch), row_strides(of.prior.logvar, batch)});
  compute(kl.device(), GaussianKlBetween{dtype_of(of.mu), read(of.mu), read(of.logvar), read(of.prior.mu),
                                         read(of.prior.logvar), write(kl), rows, of.K});
  return kl;
}

// Returns the gradients of mu and logvar, packed, in the joint batch shape, and those of prior_mu and prior_logvar,
// packed. Each is empty if it is not needed.
std::tuple<at::Tensor, at::Tensor> gaussian_kl_between_backward(const at::Tensor& grad_in,       // [*B]
                                                                const at::Tensor& mu,            // [*B, K]
                                                                const at::Tensor& logvar,        // [*B, K]
                                                                const at::Tensor& prior_mu,      // [*B, K]
                                                                const at::Tensor& prior_logvar,  // [*B, K]
                                                                bool with_grad, bool with_grad_prior) {
  constexpr auto op = "gaussian_kl_between_backward";
  const GaussianWithPrior of(op, mu, logvar, prior_mu, prior_logvar);
  const auto& batch = of.joint_batch;
  const at::Tensor grad = check_row_gradient(op, "grad", grad_in, batch, {"mu", of.mu});
  const at::Tensor grad_parameters = at::empty(concat(batch, {with_grad ? 2 * of.K : 0}), of.mu.options());
  const auto rows = group_rows<6>(
      batch, of.prior.batch,
      {row_strides(of.mu, batch), row_strides(of.logvar, batch), row_strides(of.prior.mu, batch),
       row_strides(of.prior.logvar, batch), row_strides(grad, batch, 0), row_strides(grad_parameters, batch)});
  const GradientSum grad_prior(of.mu, concat(of.prior.batch, {with_grad_prior ? 2 * of.K : 0}), rows.inner.rows);
  compute(grad.device(),
          GaussianKlBetweenBackward{dtype_of(of.mu), read(of.mu), read(of.logvar), read(of.prior.mu),
                                    read(of.prior.logvar), read(grad), with_grad ? write(grad_parameters) : nullptr,
                                    with_grad_prior ? grad_prior.rows() : GradientRows{nullptr, grad_prior.is_summed},
                                    rows, of.K});
  return {grad_parameters, grad_prior.total()};
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_kl_between", gaussian_kl_between);
  m.impl("gaussian_kl_between_backward", gaussian_kl_between_backward);
}

}  // namespace wakesleep
