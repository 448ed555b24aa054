// Gradients of z = mu + sigma eps and of log q(z). For z, dz/dmu = 1 and dz/dlogvar = (z - mu) / 2. For log q(z), where
// z also depends on mu and logvar, dlog q/dmu = 0 and dlog q/dlogvar = -1/2. The graph saves the key instead of eps.
#include "operators.h"

namespace wakesleep::autograd {
namespace {

WAKESLEEP_OPERATOR(gaussian_rsample, Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef))
WAKESLEEP_OPERATOR(gaussian_rsample_log_prob, Pair(const Tensor&, const Tensor&, const Tensor&, c10::SymIntArrayRef))
WAKESLEEP_OPERATOR(gaussian_rsample_backward, Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                                     const Tensor&, const Tensor&, c10::SymIntArrayRef))

struct Rsample : torch::autograd::Function<Rsample> {
  static variable_list forward(AutogradContext* context, const Tensor& mu, const Tensor& logvar, const Tensor& key,
                               c10::SymIntArrayRef sample_shape, bool with_log_prob) {
    context->save_for_backward({mu, logvar, key});
    context->saved_data["sample_shape"] = sample_shape.vec();
    context->set_materialize_grads(false);
    if (with_log_prob) {
      const auto [z, log_prob] = below(gaussian_rsample_log_prob(), mu, logvar, key, sample_shape);
      return {z, log_prob};
    }
    return {below(gaussian_rsample(), mu, logvar, key, sample_shape)};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &mu = saved[0], &logvar = saved[1], &key = saved[2];
    const auto grad = [&](size_t output) {
      return output < grads.size() && grads[output].defined() ? OptionalTensor(grads[output]) : std::nullopt;
    };
    const auto [grad_mu, grad_logvar] = halves(gaussian_rsample_backward().call(
        grad(0), grad(1), mu, logvar, key, context->saved_data["sample_shape"].toSymIntVector()));
    return {sum_like(grad_mu, mu), sum_like(grad_logvar, logvar), Tensor(), Tensor(), Tensor()};
  }
};

Tensor gaussian_rsample_of(const Tensor& mu, const Tensor& logvar, const Tensor& key,
                           c10::SymIntArrayRef sample_shape) {
  return needs_gradient(mu, logvar) ? Rsample::apply(mu, logvar, key, sample_shape, false)[0]
                                    : below(gaussian_rsample(), mu, logvar, key, sample_shape);
}

Pair gaussian_rsample_log_prob_of(const Tensor& mu, const Tensor& logvar, const Tensor& key,
                                  c10::SymIntArrayRef sample_shape) {
  if (!needs_gradient(mu, logvar)) {
    return below(gaussian_rsample_log_prob(), mu, logvar, key, sample_shape);
  }
  const variable_list outputs = Rsample::apply(mu, logvar, key, sample_shape, true);
  return {outputs[0], outputs[1]};
}

// Double backward: autograd differentiates this formula instead of the kernel. It obtains eps by drawing from N(0, I)
// with the same key.
Tensor gaussian_rsample_backward_of(const OptionalTensor& grad_z, const OptionalTensor& grad_log_prob, const Tensor& mu,
                                    const Tensor& logvar, const Tensor& key, c10::SymIntArrayRef sample_shape) {
  const bool has_z = grad_z && grad_z->defined(), has_log_prob = grad_log_prob && grad_log_prob->defined();
  if (!needs_gradient(mu, logvar) && !(has_z && needs_gradient(*grad_z)) &&
      !(has_log_prob && needs_gradient(*grad_log_prob))) {
    return below(gaussian_rsample_backward(), grad_z, grad_log_prob, mu, logvar, key, sample_shape);
  }
  const auto shape = at::infer_size_symdimvector(mu.sym_sizes(), logvar.sym_sizes());
  Tensor grad_mu = at::zeros_symint(shape, mu.options()), grad_logvar = at::zeros_symint(shape, mu.options());
  if (has_z) {
    const Tensor origin = at::zeros_symint(shape, mu.options());
    const Tensor eps = gaussian_rsample().call(origin, origin, key, sample_shape);
    grad_mu = grad_mu + at::sum_to(*grad_z, shape);
    grad_logvar = grad_logvar + 0.5 * at::sum_to(*grad_z * eps * (0.5 * logvar).exp(), shape);
  }
  if (has_log_prob) {
    const auto batch = c10::SymIntArrayRef(shape).slice(0, shape.size() - 1);
    grad_logvar = grad_logvar - 0.5 * at::sum_to(*grad_log_prob, batch).unsqueeze(-1);
  }
  return at::cat({grad_mu, grad_logvar}, -1);
}

}  // namespace

TORCH_LIBRARY_IMPL(wakesleep_ext, Autograd, m) {
  m.impl("gaussian_rsample", gaussian_rsample_of);
  m.impl("gaussian_rsample_log_prob", gaussian_rsample_log_prob_of);
  m.impl("gaussian_rsample_backward", gaussian_rsample_backward_of);
}

}  // namespace wakesleep::autograd
