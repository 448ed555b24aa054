// log N(z; 0, I) and its gradient.
#include "geometry.h"
#include "register.h"

namespace wakesleep {
namespace {

// Checks z and returns it with contiguous events.
at::Tensor check_standard_gaussian_value(const char* op, const at::Tensor& z) {
  check_floating(op, {"z", z});
  check_event(op, {"z", z});
  return with_contiguous_events(z);
}

at::Tensor standard_gaussian_log_prob(const at::Tensor& z_in) {  // [*B, K]
  const at::Tensor z = check_standard_gaussian_value("standard_gaussian_log_prob", z_in);
  const auto batch = batch_sizes(z);
  const at::Tensor log_prob = at::empty(batch, z.options().dtype(compute_dtype(z.scalar_type())));
  const auto rows = map_rows<1>(batch, {row_strides(z, batch)});
  compute(z.device(), StandardGaussianLogProb{dtype_of(z), read(z), write(log_prob), rows, z.size(-1)});
  return log_prob;
}

at::Tensor standard_gaussian_log_prob_backward(const at::Tensor& grad_in,  // [*B]
                                               const at::Tensor& z_in) {   // [*B, K]
  constexpr auto op = "standard_gaussian_log_prob_backward";
  const at::Tensor z = check_standard_gaussian_value(op, z_in);
  const auto batch = batch_sizes(z);
  const at::Tensor grad = check_row_gradient(op, "grad", grad_in, batch, {"z", z});
  const at::Tensor grad_z = at::empty(z.sizes(), z.options());
  const auto rows = map_rows<2>(batch, {row_strides(z, batch), row_strides(grad, batch, 0)});
  compute(z.device(),
          StandardGaussianLogProbBackward{dtype_of(z), read(z), read(grad), write(grad_z), rows, z.size(-1)});
  return grad_z;
}

}  // namespace

WAKESLEEP_OPS(m) {
  m.impl("standard_gaussian_log_prob", standard_gaussian_log_prob);
  m.impl("standard_gaussian_log_prob_backward", standard_gaussian_log_prob_backward);
}

}  // namespace wakesleep
