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

// Returns scale sum_n sample_weight_n log N(z_n), log N(z_n), or an empty tensor [0] if it is not needed, and gradients
// as the op above does.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gaussian_log_prob_and_gradients(
    const at::Tensor& mu,                            // [*B, K]
    const at::Tensor& logvar,                        // [*B, K]
    const at::Tensor& z,                             // [*S, *B, K]
    const std::optional<at::Tensor>& sample_weight,  // broadcasts to [*S, *B]
    double scale, bool with_grad_z, bool with_log_prob) {
  constexpr auto op = "gaussian_log_prob_sum";
  const GaussianOperands of(op, mu, logvar, z);
  const auto& batch = of.value_batch;
  at::Tensor upstream;
  at::DimVector upstream_strides(batch.size(), 0);
  if (sample_weight) {
    check_same_device(op, {"mu", of.mu}, {"sample_weight", *sample_weight});
    check_row_weights(op, {"sample_weight", *sample_weight}, c10::fromIntArrayRefSlow(batch));
    upstream = sample_weight->to(compute_dtype(of.dtype()));
    upstream_strides = row_strides(upstream, batch, 0);
  }
  const at::Tensor grad_z = at::empty(concat(batch, {with_grad_z ? of.K : 0}), of.mu.options());
  const auto rows = group_rows<5>(batch, of.batch,
                                  {row_strides(of.mu, batch), row_strides(of.logvar, batch), row_strides(of.z, batch),
                                   upstream_strides, row_strides(grad_z, batch)});
  const GradientSum parameters(of.mu, of.packed_shape(), rows.inner.rows);
  GaussianLogProbAndGradients call = {dtype_of(of.mu),
                                      read(of.mu),
                                      read(of.logvar),
                                      read(of.z),
                                      read(upstream),
                                      scale,
                                      parameters.rows(),
                                      nullptr,
                                      nullptr,
                                      rows,
                                      of.K};
  const bool is_one_part = call.parts() == 1;
  const at::Tensor sums = at::empty(is_one_part ? at::DimVector{} : at::DimVector{call.parts()}, of.compute_options());
  call.grad_z = with_grad_z ? write(grad_z) : nullptr;
  call.sums = write(sums);
  compute(of.mu.device(), call);
  return {is_one_part ? sums : sums.sum(),
          with_log_prob ? gaussian_log_prob(of.mu, of.logvar, of.z) : at::empty({0}, sums.options()),
          parameters.total(), grad_z};
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_log_prob", gaussian_log_prob);
  m.impl("gaussian_log_prob_backward", gaussian_log_prob_backward);
  m.impl("gaussian_log_prob_and_gradients", gaussian_log_prob_and_gradients);
}

}  // namespace wakesleep
