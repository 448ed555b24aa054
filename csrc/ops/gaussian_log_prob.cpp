// log N(z; mu, diag e^logvar) and its gradients.
#include "gaussian.h"
#include "register.h"

namespace wakesleep {
namespace {

at::Tensor gaussian_log_prob(const at::Tensor& mu,      // [*B, K]
                             const at::Tensor& logvar,  // [*B, K]
                             const at::Tensor& z) {     // [*S, *B, K]
  const GaussianOperands of("gaussian_log_prob", mu, logvar, z);
  const auto& batch = of.value_batch;
  const at::Tensor log_prob = at::empty(batch, of.compute_options());
  const auto rows =
      map_rows<3>(batch, {row_strides(of.mu, batch), row_strides(of.logvar, batch), row_strides(of.z, batch)});
  compute(log_prob.device(),
          GaussianLogProb{dtype_of(of.mu), read(of.mu), read(of.logvar), read(of.z), write(log_prob), rows, of.K});
  return log_prob;
}

// Returns the gradients of mu and logvar, packed, and the gradient of z, which is empty if it is not needed.
std::tuple<at::Tensor, at::Tensor> gaussian_log_prob_backward(const at::Tensor& grad_in,  // [*S, *B]
                                                              const at::Tensor& mu,       // [*B, K]
                                                              const at::Tensor& logvar,   // [*B, K]
                                                              const at::Tensor& z,        // [*S, *B, K]
                                                              bool with_grad_z) {
  constexpr auto op = "gaussian_log_prob_backward";
  const GaussianOperands of(op, mu, logvar, z);
  const auto& batch = of.value_batch;
  const at::Tensor grad = check_row_gradient(op, "grad", grad_in, batch, {"mu", of.mu});
  const at::Tensor grad_z = at::empty(concat(batch, {with_grad_z ? of.K : 0}), of.mu.options());
  const auto rows = group_rows<5>(batch, of.batch,
                                  {row_strides(of.mu, batch), row_strides(of.logvar, batch), row_strides(of.z, batch),
                                   row_strides(grad, batch, 0), row_strides(grad_z, batch)});
  const GradientSum parameters(of.mu, of.packed_shape(), rows.inner.rows);
  compute(grad.device(), GaussianLogProbBackward{dtype_of(of.mu), read(of.mu), read(of.logvar), read(of.z), read(grad),
                                                 parameters.rows(), with_grad_z ? write(grad_z) : nullptr, rows, of.K});
  return {parameters.total(), grad_z};
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_log_prob", gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward);
}

}  // namespace wakesleep
