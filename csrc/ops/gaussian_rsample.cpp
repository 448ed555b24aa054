// z = mu + sigma eps, log q(z), and the gradients of both.
#include "gaussian.h"
#include "members.h"
#include "register.h"

namespace wakesleep {

std::tuple<at::Tensor, at::Tensor> draw_gaussian(const char* op, const at::Tensor& mu, const at::Tensor& logvar,
                                                 const at::Tensor& key, at::IntArrayRef sample_shape,
                                                 bool with_log_prob) {
  const GaussianParameters of(op, mu, logvar);
  const Members members(op, key, {"mu", of.mu}, of.batch);
  check_sizes(op, "sample_shape", sample_shape);
  const at::Tensor z = at::empty(members.draw_shape(sample_shape, {of.K}), of.mu.options());
  const at::Tensor log_prob =
      with_log_prob ? at::empty(members.draw_shape(sample_shape, {}), of.compute_options()) : at::Tensor();
  const bool draws_nothing = !with_log_prob && z.numel() == 0;
  const int64_t samples = draws_nothing ? 0 : c10::multiply_integers(sample_shape);
  const std::array<at::DimVector, 2> strides = {row_strides(of.mu, of.batch), row_strides(of.logvar, of.batch)};
  const auto rows = members.rows<2>(strides);
  members.for_each<2>(strides, [&](int64_t member, const int64_t* member_key, const RowOffsets<2>& first) {
    const int64_t first_row = member * samples * rows.rows;
    compute(z.device(),
            GaussianRsample{dtype_of(of.mu), read(of.mu, first.of[0]), read(of.logvar, first.of[1]), member_key,
                            write(z, first_row * of.K), write(log_prob, first_row), rows, samples, of.K});
  });
  return {z, log_prob};
}

namespace {

at::Tensor gaussian_rsample(const at::Tensor& mu,      // [*B, K]
                            const at::Tensor& logvar,  // [*B, K]
                            const at::Tensor& key,     // [2] or [*M, 2]
                            at::IntArrayRef sample_shape) {
  return std::get<0>(draw_gaussian("gaussian_rsample", mu, logvar, key, sample_shape, false));
}

std::tuple<at::Tensor, at::Tensor> gaussian_rsample_log_prob(const at::Tensor& mu,      // [*B, K]
                                                             const at::Tensor& logvar,  // [*B, K]
                                                             const at::Tensor& key,     // [2] or [*M, 2]
                                                             at::IntArrayRef sample_shape) {
  return draw_gaussian("gaussian_rsample_log_prob", mu, logvar, key, sample_shape, true);
}

at::Tensor gaussian_rsample_backward(const std::optional<at::Tensor>& grad_z_in,         // [*S, *B, K]
                                     const std::optional<at::Tensor>& grad_log_prob_in,  // [*S, *B]
                                     const at::Tensor& mu,                               // [*B, K]
                                     const at::Tensor& logvar,                           // [*B, K]
                                     const at::Tensor& key,                              // [2] or [*M, 2]
                                     at::IntArrayRef sample_shape) {
  constexpr auto op = "gaussian_rsample_backward";
  const GaussianParameters of(op, mu, logvar);
  const Members members(op, key, {"mu", of.mu}, of.batch);
  check_sizes(op, "sample_shape", sample_shape);
  const int64_t samples = of.mu.numel() == 0 ? 0 : c10::multiply_integers(sample_shape);
  const std::array<at::DimVector, 1> strides = {row_strides(of.logvar, of.batch)};
  const auto rows = members.rows<1>(strides);
  const GradientSum parameters(of.mu, of.packed_shape(), samples, members.shape.size());
  at::Tensor grad_z, grad_log_prob;
  if (grad_z_in && grad_z_in->defined()) {
    const auto shape = members.draw_shape(sample_shape, {of.K});
    TORCH_CHECK_VALUE(grad_z_in->sizes() == shape, op, ": expected grad_z to have shape ", shape, ", got ",
                      grad_z_in->sizes());
    grad_z = grad_z_in->to(of.dtype()).contiguous();
  }
  if (grad_log_prob_in && grad_log_prob_in->defined()) {
    grad_log_prob =
        check_row_gradient(op, "grad_log_prob", *grad_log_prob_in, members.draw_shape(sample_shape, {}), {"mu", of.mu})
            .contiguous();
  }
  members.for_each<1>(strides, [&](int64_t member, const int64_t* member_key, const RowOffsets<1>& first) {
    const int64_t first_row = member * samples * rows.rows;
    const GradientRows written = {write(parameters.written, member * (parameters.written.numel() / members.count)),
                                  parameters.is_summed};
    compute(of.mu.device(),
            GaussianRsampleBackward{dtype_of(of.logvar), read(grad_z, first_row * of.K), read(grad_log_prob, first_row),
                                    read(of.logvar, first.of[0]), member_key, written, rows, samples, of.K});
  });
  return parameters.total();
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("gaussian_rsample", gaussian_rsample);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward);
}

}  // namespace wakesleep
