// z = mu + sigma eps, log q(z), and the gradients of both.
#include "gaussian.h"
#include "register.h"

namespace wakesleep {
namespace {

// Returns z [*S, *B, K] and, if requested, log_prob [*S, *B].
std::tuple<at::Tensor, at::Tensor> draw_gaussian(const char* op, const at::Tensor& mu, const at::Tensor& logvar,
                                                 const at::Tensor& key_in, at::IntArrayRef sample_shape,
                                                 bool with_log_prob) {
  const GaussianParameters of(op, mu, logvar);
  check_key(op, key_in, {"mu", of.mu});
  check_sample_shape(op, sample_shape);
  const at::Tensor key = key_in.contiguous();
  const auto z_batch = concat(sample_shape, of.batch);
  const at::Tensor z = at::empty(concat(z_batch, {of.K}), of.mu.options());
  const at::Tensor log_prob = with_log_prob ? at::empty(z_batch, of.compute_options()) : at::Tensor();
  const bool draws_nothing = !with_log_prob && z.numel() == 0;
  const int64_t samples = draws_nothing ? 0 : c10::multiply_integers(sample_shape);
  const auto rows = map_rows<2>(of.batch, {row_strides(of.mu, of.batch), row_strides(of.logvar, of.batch)});
  compute(z.device(), GaussianRsample{dtype_of(of.mu), read(of.mu), read(of.logvar), key.const_data_ptr<int64_t>(),
                                      write(z), write(log_prob), rows, samples, of.K});
  return {z, log_prob};
}

at::Tensor gaussian_rsample(const at::Tensor& mu,      // [*B, K]
                            const at::Tensor& logvar,  // [*B, K]
                            const at::Tensor& key,     // [2]
                            at::IntArrayRef sample_shape) {
  return std::get<0>(draw_gaussian("gaussian_rsample", mu, logvar, key, sample_shape, false));
}

std::tuple<at::Tensor, at::Tensor> gaussian_rsample_log_prob(const at::Tensor& mu,      // [*B, K]
                                                             const at::Tensor& logvar,  // [*B, K]
                                                             const at::Tensor& key,     // [2]
                                                             at::IntArrayRef sample_shape) {
  return draw_gaussian("gaussian_rsample_log_prob", mu, logvar, key, sample_shape, true);
}

at::Tensor gaussian_rsample_backward(const std::optional<at::Tensor>& grad_z_in,         // [*S, *B, K]
                                     const std::optional<at::Tensor>& grad_log_prob_in,  // [*S, *B]
                                     const at::Tensor& mu,                               // [*B, K]
                                     const at::Tensor& logvar,                           // [*B, K]
                                     const at::Tensor& key_in,                           // [2]
                                     at::IntArrayRef sample_shape) {
  constexpr auto op = "gaussian_rsample_backward";
  const GaussianParameters of(op, mu, logvar);
  const int64_t samples = of.mu.numel() == 0 ? 0 : c10::multiply_integers(sample_shape);
  const auto rows = map_rows<1>(of.batch, {row_strides(of.logvar, of.batch)});
  const GradientSum parameters(of.mu, of.packed_shape(), samples);
  check_key(op, key_in, {"mu", of.mu});
  check_sample_shape(op, sample_shape);
  const at::Tensor key = key_in.contiguous();
  const auto z_batch = concat(sample_shape, of.batch);
  at::Tensor grad_z, grad_log_prob;
  if (grad_z_in && grad_z_in->defined()) {
    const auto shape = concat(z_batch, {of.K});
    TORCH_CHECK_VALUE(grad_z_in->sizes() == shape, op, ": expected grad_z to have shape ", shape, ", got ",
                      grad_z_in->sizes());
    grad_z = grad_z_in->to(of.dtype()).contiguous();
  }
  if (grad_log_prob_in && grad_log_prob_in->defined()) {
    grad_log_prob = check_row_gradient(op, "grad_log_prob", *grad_log_prob_in, z_batch, {"mu", of.mu}).contiguous();
  }
  compute(of.mu.device(),
          GaussianRsampleBackward{dtype_of(of.logvar), read(grad_z), read(grad_log_prob), read(of.logvar),
                                  key.const_data_ptr<int64_t>(), parameters.rows(), rows, samples, of.K});
  return parameters.total();
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_rsample", gaussian_rsample);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward);
}

}  // namespace wakesleep
